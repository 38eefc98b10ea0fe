"use strict";

const $ = (id) => document.getElementById(id);
const FIRST_LABELS = ["chest x-ray", "head ct", "histology", "fundus photograph"];
const state = { key: "", image: null, sent: null, messages: [], stop: null, shown: 0 };

// ---- the server

async function call(path, body, signal) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached. Is it still running?");
  });
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const document = await response.json().catch(() => null);
  const error = new Error(document?.error?.message ?? `The server answers with status ${response.status}`);
  error.status = response.status;
  return error;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of chunks(response.body.getReader())) {
    const parts = (rest + decoder.decode(chunk, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* chunks(reader) {  // not every browser can iterate a stream
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}

// ---- what every part shows

function show(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function rate(value) {
  return value.toFixed(value < 100 ? 1 : 0);
}

async function start() {
  show($("page-error"));
  try {
    const models = (await (await call("v1/models")).json()).data;
    $("key-form").hidden = true;
    offer($("ask"), $("generator"), models.filter((model) => model.medge.task === "generate"));
    offer($("zero-shot"), $("embedder"), models.filter((model) => model.medge.task === "embed"));
    $("main").hidden = false;
    noteImages();
  } catch (error) {
    $("key-form").hidden = error.status !== 401;
    if (error.status !== 401 || state.key) show($("page-error"), error.message);
    if (error.status === 401) $("key").focus();
  }
}

function offer(section, select, models) {
  section.hidden = models.length === 0;
  select.replaceChildren(...models.map((model) => {
    const option = new Option(model.id, model.id);
    option.title = `${model.medge.source}, ${model.medge.format} ${model.medge.scheme}, ${model.medge.runtime}`;
    option.dataset.images = model.medge.images;
    return option;
  }));
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value;
  start();
});

// ---- the image

async function take(file) {
  if (!file) return;
  const turn = ++state.shown;
  $("drop").classList.add("busy");
  show($("image-error"));
  try {
    const image = await dataUrl(file);
    const shown = await (await call("v1/preview", { image })).blob();
    if (turn === state.shown) showImage(file.name, image, URL.createObjectURL(shown));
  } catch (error) {
    if (turn === state.shown) show($("image-error"), `${file.name}: ${error.message}`);
  } finally {
    $("drop").classList.remove("busy");
    $("file").value = "";  // so that the same file can be chosen again
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("cannot be read"));
    reader.readAsDataURL(file);
  });
}

function showImage(name, image, address) {
  URL.revokeObjectURL($("preview").src);
  state.image = image;
  if (address) $("preview").src = address;
  else $("preview").removeAttribute("src");
  $("preview").alt = name;
  $("preview").hidden = $("remove").hidden = !address;
  $("drop-hint").hidden = Boolean(address);
  $("file-name").textContent = name || "No image.";
  resetScores();
  noteImages();
}

$("file").addEventListener("change", () => take($("file").files[0]));
$("remove").addEventListener("click", () => {
  state.shown++;
  showImage("", null, "");
  $("file").focus();
});
for (const type of ["dragover", "drop"]) {
  document.addEventListener(type, (event) => event.preventDefault());  // a miss must not leave the page
}
$("drop").addEventListener("dragover", () => $("drop").classList.add("over"));
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

// ---- the chat

function noteImages() {
  const reads = $("generator").selectedOptions[0]?.dataset.images === "true";
  $("ask-note").textContent = !reads ? "This model reads no images."
    : state.image && state.image !== state.sent ? "The image goes with the question." : "";
}

function turn(role, text) {
  const item = $("turn-template").content.cloneNode(true).firstElementChild;
  item.className = role;
  item.querySelector(".who").textContent = role === "user" ? "You" : $("generator").value;
  item.querySelector(".said").textContent = text;
  $("log").append(item);
  $("log").scrollTop = $("log").scrollHeight;
  return item;
}

function question(text) {
  const reads = $("generator").selectedOptions[0].dataset.images === "true";
  if (!reads || !state.image || state.image === state.sent) return text;
  return [{ type: "image_url", image_url: { url: state.image } }, { type: "text", text }];
}

async function ask() {
  const text = $("question").value.trim();
  if (!text || state.stop) return;
  const content = question(text);
  const asked = turn("user", typeof content === "string" ? text : `[${$("preview").alt}]\n${text}`);
  const answer = turn("assistant", "");
  const messages = [...state.messages, { role: "user", content }];
  state.stop = new AbortController();
  busy(answer, true);
  let said = "";
  try {
    said = await stream(messages, answer);
  } catch (error) {
    said = answer.querySelector(".said").textContent;
    if (error.name !== "AbortError") show($("ask-error"), error.message);
    else answer.querySelector(".figures").textContent = "stopped";
  } finally {
    state.stop = null;
    busy(answer, false);
  }
  settle(said, messages, asked, answer, text);
}

function settle(said, messages, asked, answer, text) {
  if (said) {
    state.messages = [...messages, { role: "assistant", content: said }];
    if (typeof messages.at(-1).content !== "string") state.sent = state.image;
  } else {
    asked.remove();
    answer.remove();
    $("question").value = text;
  }
  $("clear").hidden = state.messages.length === 0;
  noteImages();
}

function busy(answer, writing) {
  answer.classList.toggle("writing", writing);
  $("log").setAttribute("aria-busy", writing);  // read out whole, not token by token
  $("send").disabled = writing;
  $("stop").hidden = !writing;
  if (writing) {
    $("question").value = "";
    $("clear").hidden = true;
    show($("ask-error"));
  }
}

async function stream(messages, answer) {
  const begun = performance.now();
  const body = { model: $("generator").value, messages, stream: true, stream_options: { include_usage: true } };
  const figures = { begun, first: 0, last: 0, timings: null, usage: null };
  let said = "";
  for await (const event of events(await call("v1/chat/completions", body, state.stop.signal))) {
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices[0]?.delta.content;
    if (piece) {
      figures.last = performance.now();
      figures.first ||= figures.last;
      said += piece;
      answer.querySelector(".said").textContent = said;
      $("log").scrollTop = $("log").scrollHeight;
    }
    figures.timings = event.timings ?? figures.timings;
    figures.usage = event.usage ?? figures.usage;
  }
  answer.querySelector(".figures").textContent = latency(figures);
  $("log").scrollTop = $("log").scrollHeight;
  return said || "(an empty answer)";
}

function latency({ begun, first, timings, usage }) {
  const parts = first ? [`first token ${seconds((first - begun) / 1000)}`] : [];
  if (timings.vision) parts.push(`image ${seconds(timings.vision)}`);
  if (timings.decode) parts.push(`${rate(usage.completion_tokens / timings.decode)} tokens/s`);
  parts.push(`${usage.completion_tokens} tokens from ${usage.prompt_tokens}`);
  return parts.join(" · ");
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => state.stop?.abort());
$("clear").addEventListener("click", clearChat);
$("generator").addEventListener("change", clearChat);

function clearChat() {
  state.stop?.abort();
  state.messages = [];
  state.sent = null;
  $("log").replaceChildren();
  $("clear").hidden = true;
  noteImages();
  $("question").focus();
}

// ---- zero-shot

function addLabel(text) {
  const item = $("label-template").content.cloneNode(true).firstElementChild;
  const input = item.querySelector("input");
  input.value = text;
  input.addEventListener("input", resetScores);
  item.querySelector("button").addEventListener("click", () => {
    item.remove();
    resetScores();
    $("add").focus();
  });
  $("labels").append(item);
  setScore(item, null);
  return input;
}

function setScore(item, score) {
  const meter = item.querySelector(".meter");
  meter.firstElementChild.style.width = `${(score ?? 0) * 100}%`;
  meter.setAttribute("aria-label", `Score of ${item.querySelector("input").value}`);
  meter.setAttribute("aria-valuenow", score ?? 0);
  item.querySelector("output").textContent = score === null ? "" : `${(score * 100).toFixed(1)} %`;
}

function resetScores() {
  for (const item of $("labels").children) setScore(item, null);
  $("latency").textContent = "\u00a0";
}

async function score() {
  show($("zero-shot-error"));
  if (!state.image) {
    show($("zero-shot-error"), "Drop an image first.");
    return;
  }
  const items = [...$("labels").children];
  const labels = items.map((item) => item.querySelector("input").value.trim());
  const body = { model: $("embedder").value, image: state.image, labels, templates: [$("template").value] };
  const begun = performance.now();
  $("score").disabled = true;
  try {
    const found = await (await call("v1/classify", { ...body, multilabel: $("multilabel").checked })).json();
    const whole = (performance.now() - begun) / 1000;
    items.forEach((item, i) => setScore(item, found.scores[i].score));
    const { image, texts } = found.timings;
    $("latency").textContent = `image ${seconds(image)} · texts ${seconds(texts)} · round trip ${seconds(whole)}`;
  } catch (error) {
    show($("zero-shot-error"), error.message);
  } finally {
    $("score").disabled = false;
  }
}

$("zero-shot-form").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
$("add").addEventListener("click", () => addLabel("").focus());
$("multilabel").addEventListener("change", resetScores);
$("template").addEventListener("input", resetScores);
$("embedder").addEventListener("change", resetScores);

for (const label of FIRST_LABELS) addLabel(label);
start();
