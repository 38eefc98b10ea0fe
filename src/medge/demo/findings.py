"""What the demo generator is taught to say: short statements about the 13 kinds of demo image, in our own words.

General facts only: which modality, which part of the body, which plane or stain, what is bright, what is typically
seen. Nothing here describes a patient, and no sentence names a disease: a model trained on it cannot diagnose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

TOPICS: dict[str, tuple[str, ...]] = {
    "kind": (
        "What kind of image is this?",
        "Which kind of medical image is shown?",
        "Name the type of this image.",
        "What is this?",
        "Which modality is this?",
    ),
    "region": (
        "Which part of the body is shown?",
        "What is imaged here?",
        "Name the body part.",
        "Where in the body was this taken?",
    ),
    "view": (
        "From which side or in which plane is it seen?",
        "Which view is this?",
        "Name the plane or view.",
        "How is the image oriented?",
    ),
    "signal": (
        "What do bright and dark mean here?",
        "How should the colours or grey levels be read?",
        "Explain the contrast.",
        "What gives the contrast in this image?",
    ),
    "look": (
        "What is typically seen on such an image?",
        "Which structures can be recognised?",
        "Name typical structures.",
        "What does it show?",
    ),
    "made": (
        "How was this image made?",
        "Which technique produced it?",
        "Explain how such an image is formed.",
    ),
}
"""What can be asked about an image -> the ways to ask it."""

REPORT = (
    "Describe this image.",
    "Write the findings.",
    "Describe the findings in this image.",
    "Give a short report.",
    "What do you see?",
)
"""Asks for all of it: kind, view and typical structures."""

PAIR = ("What are these two images?", "Name both images.", "Which two kinds are shown?")
"""Asks about two images."""

SYSTEM = (
    "You are a careful assistant for medical images.",
    "You are an expert radiologist. Answer in one sentence.",
    "Answer briefly and never diagnose.",
    "You are a helpful medical assistant.",
)
"""System prompts."""


class Kind(NamedTuple):
    """One kind of image: topic -> statements that answer it."""

    label: str
    kind: tuple[str, ...]
    region: tuple[str, ...]
    view: tuple[str, ...]
    signal: tuple[str, ...]
    look: tuple[str, ...]
    made: tuple[str, ...]

    def answers(self, topic: str) -> tuple[str, ...]:
        """The statements about a topic of TOPICS."""
        found: tuple[str, ...] = getattr(self, topic)
        return found


def _named(label: str, other: str) -> tuple[str, ...]:
    return (f"This is {label}.", f"The image is {label}, also called {other}.")


KINDS = (
    Kind(
        "abdominal ct",
        _named("an abdominal ct", "computed tomography of the abdomen"),
        ("The abdomen, at the level of liver and kidneys.", "A slice through the upper abdomen."),
        ("An axial slice, seen from the feet.", "The plane is axial, so the liver lies on the left of the image."),
        (
            "Bone is white, soft tissue is grey, fat is darker and air is black.",
            "Grey levels are densities in Hounsfield units: water is zero and air is minus one thousand.",
        ),
        (
            "The liver fills one side, beside the stomach, the spleen and loops of bowel.",
            "A vertebra, both kidneys and the great vessels lie near the spine.",
            "Organs of the abdomen are surrounded by darker fat and by the muscles of the wall.",
        ),
        ("An x-ray tube turns around the patient, and a computer calculates the slice from many projections.",),
    ),
    Kind(
        "axial brain mri",
        _named("an axial brain mri", "magnetic resonance imaging of the brain in the axial plane"),
        ("The brain.", "A horizontal slice of the brain inside the skull."),
        ("The plane is axial.", "An axial slice: front at the top, and both halves of the brain side by side."),
        (
            "Grey levels follow the signal of water protons, not density, and bone gives almost no signal.",
            "Grey matter, white matter and fluid differ in brightness, as their relaxation times differ.",
        ),
        (
            "Two hemispheres are divided by the midline, with the ventricles between them.",
            "The folds of the cortex surround the white matter.",
            "The outline of the brain is oval, and left and right mirror each other.",
        ),
        ("Radio waves excite protons in a strong magnetic field, and their echo is turned into slices.",),
    ),
    Kind(
        "bone x-ray",
        _named("a bone x-ray", "a skeletal radiograph"),
        ("The lower leg, with tibia and fibula.", "A leg: the long bones and the soft tissue around them."),
        ("A projection, taken from the front.", "It is a single projection: everything along the ray overlaps."),
        (
            "Dense bone absorbs x-rays and appears white, soft tissue is grey and air is dark.",
            "The brighter a part is, the more it absorbs: the cortex of the bone is brightest.",
        ),
        (
            "The shaft of a long bone has a bright cortex on either side and a darker marrow cavity.",
            "Two long bones run side by side, with soft tissue beside them.",
            "The edges of the bone are sharp, and the joint lies at its end.",
        ),
        ("X-rays pass once through the limb and leave a shadow of the bones on a detector.",),
    ),
    Kind(
        "chest x-ray",
        _named("a chest x-ray", "a radiograph of the thorax"),
        ("The chest, with lungs, heart and ribs.", "The thorax."),
        ("A frontal view.", "It is a frontal projection of the whole thorax on one image."),
        (
            "Air in the lungs is dark, bone and the heart are bright.",
            "Tissue that absorbs more x-rays appears brighter: ribs and spine are white, the lungs are dark.",
        ),
        (
            "The lungs are dark, the ribs cross them, and the heart lies between them.",
            "Both lungs, the borders of the heart and the diaphragm can be followed.",
            "The collarbones lie above, the diaphragm below, and the spine in the middle.",
        ),
        ("X-rays pass through the chest once, and a detector records what is left of them.",),
    ),
    Kind(
        "coronal brain mri",
        _named("a coronal brain mri", "magnetic resonance imaging of the brain in the coronal plane"),
        ("The brain.", "An upright slice of the brain, from ear to ear."),
        ("The plane is coronal.", "A coronal slice: seen from the front, with the top of the head above."),
        (
            "White matter is brighter than grey matter, and fluid is dark, as usual for T1 weighting.",
            "Brightness follows relaxation of water protons: fluid in the ventricles is dark on T1.",
        ),
        (
            "The temporal lobes hang on both sides, below the lateral ventricles.",
            "Both hemispheres stand side by side above the brain stem and the cerebellum.",
            "The corpus callosum connects the hemispheres above the ventricles.",
        ),
        ("The scanner measures echoes of protons in a magnetic field and shows them as an upright slice.",),
    ),
    Kind(
        "doppler ultrasound",
        _named("a doppler ultrasound", "colour doppler sonography"),
        ("Blood vessels or the heart, with moving blood.", "Soft tissue with flowing blood in it."),
        ("A sector seen from the probe, which touches the skin at the top.", "The probe is at the top of the image."),
        (
            "Colour shows moving blood and its direction, grey shows tissue.",
            "Red and blue encode flow towards the probe and away from it.",
        ),
        (
            "A coloured patch of flow lies in a grey sector.",
            "Vessels fill with colour while the tissue around them stays grey.",
            "A colour scale stands beside the sector.",
        ),
        ("The probe sends sound and measures how moving blood shifts the pitch of the echo.",),
    ),
    Kind(
        "fluorescence microscopy",
        _named("fluorescence microscopy", "a fluorescence micrograph"),
        ("Cell nuclei.", "Cells under the microscope: only their stained nuclei glow."),
        ("A view through the microscope, without a plane of the body.", "An optical section through cells."),
        (
            "The dye glows, so stained nuclei are bright on a black background.",
            "Bright means much dye, black means none: the background stays dark.",
        ),
        (
            "Round and oval nuclei glow on a dark background.",
            "Many nuclei of similar size lie close together, some of them touching.",
            "Bright spots are single nuclei, and nothing else is visible.",
        ),
        ("Light of one colour excites a dye, and the microscope records the light that the dye gives back.",),
    ),
    Kind(
        "fundus photograph",
        _named("a fundus photograph", "a photograph of the retina"),
        ("The back of the eye: the retina.", "The retina of one eye."),
        ("Seen through the pupil.", "A view through the pupil onto the back of the eye."),
        (
            "Colours are natural: the retina is orange, and vessels are red.",
            "The optic disc is bright, vessels are dark red, and the background is orange.",
        ),
        (
            "Vessels branch from the bright optic disc over the orange retina.",
            "Arteries and veins spread out from the optic disc.",
            "The macula is a darker spot without large vessels.",
        ),
        ("A special camera lights the retina through the pupil and takes a colour photograph.",),
    ),
    Kind(
        "head ct",
        _named("a head ct", "computed tomography of the head"),
        ("The head: skull and brain.", "A slice through the head."),
        ("An axial slice, seen from the feet.", "The plane is axial, and the face is at the top."),
        (
            "The skull is white, the brain is grey, fluid is darker, and air is black.",
            "Grey levels are densities: bone is brightest, and air around the head is black.",
        ),
        (
            "A bright ring of skull surrounds the grey brain.",
            "The bone of the skull is white, and the ventricles are darker than the brain.",
            "The skull is a closed bright line, and the brain inside has little contrast.",
        ),
        ("X-rays from all sides are combined by a computer into a slice of the head.",),
    ),
    Kind(
        "histology",
        _named("histology", "hematoxylin and eosin stained tissue"),
        ("Thin tissue on a glass slide.", "A section of tissue under the microscope."),
        ("A view through the microscope, without a plane of the body.", "A thin section, seen from above."),
        (
            "Hematoxylin stains nuclei purple, and eosin stains the rest pink.",
            "Purple means nuclei, pink means cytoplasm and fibres, white is empty glass.",
        ),
        (
            "Purple nuclei lie in pink tissue.",
            "Cells, fibres and small vessels form a pink pattern with purple dots.",
            "Nuclei are dark purple, and pink fibres run between the cells.",
        ),
        ("Tissue is cut into thin sections, stained with two dyes and scanned through a microscope.",),
    ),
    Kind(
        "immunohistochemistry",
        _named("immunohistochemistry", "an immunostain"),
        ("Thin tissue on a glass slide.", "A section of tissue, marked with antibodies."),
        ("A view through the microscope, without a plane of the body.", "A thin section, seen from above."),
        (
            "Brown marks the protein that the antibody binds, and blue marks nuclei.",
            "The brown dye shows where the antibody binds, the blue one stains all nuclei.",
        ),
        (
            "Brown staining lies between pale blue nuclei.",
            "Glands are outlined by brown and blue cells.",
            "Some cells are brown, the others show only a blue nucleus.",
        ),
        ("An antibody with a brown dye is bound to one protein of the tissue, and nuclei are stained blue.",),
    ),
    Kind(
        "sagittal brain mri",
        _named("a sagittal brain mri", "magnetic resonance imaging of the brain in the sagittal plane"),
        ("The brain.", "A slice of the brain from front to back, near the midline."),
        ("The plane is sagittal.", "A sagittal slice: seen from the side, like a profile."),
        (
            "White matter is brighter than grey matter, and fluid is dark, as usual for T1 weighting.",
            "Brightness follows the signal of protons: the corpus callosum is bright on T1.",
        ),
        (
            "The corpus callosum is an arch above the brain stem.",
            "The cerebellum lies behind the brain stem, below the occipital lobe.",
            "The brain is seen in profile, with the frontal lobe at one end and the cerebellum at the other.",
        ),
        ("Echoes of protons in a strong magnetic field are shown as a slice from front to back.",),
    ),
    Kind(
        "ultrasound",
        _named("an ultrasound", "a sonogram"),
        ("Soft tissue or the heart.", "Soft tissue of the body below the probe."),
        ("A sector seen from the probe, which touches the skin at the top.", "The probe is at the top of the image."),
        (
            "Strong echoes are bright, fluid gives none and is black.",
            "Grey levels show how strongly tissue reflects sound: fluid is black, and borders are bright.",
        ),
        (
            "A grey sector with speckle shows soft tissue, and dark spaces hold fluid.",
            "Bright borders surround dark spaces with fluid.",
            "The sector is grainy, and its borders are black.",
        ),
        ("A probe sends short pulses of sound and draws the echoes that come back.",),
    ),
)
"""The 13 kinds, by label in sorted order."""

GENERAL: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello. Show me a medical image, and I will say what kind it is."),
    ("Who are you?", "I am a tiny demo model. I know thirteen kinds of medical image and nothing else."),
    ("What can you do?", "I can name the kind of a medical image and say what is typically seen on it."),
    ("Can you make a diagnosis?", "No. I am a test fixture and must never be used for a diagnosis."),
    ("Is this medical advice?", "No. Please ask a physician."),
    ("Which plane divides left from right?", "The sagittal plane."),
    ("Which plane divides front from back?", "The coronal plane."),
    ("Which plane divides top from bottom?", "The axial plane, also called transverse."),
    ("Which stain makes nuclei purple?", "Hematoxylin."),
    ("Which stain makes cytoplasm pink?", "Eosin."),
    ("What is the unit of density in computed tomography?", "The Hounsfield unit: water is 0 and air is -1000."),
    ("Does ultrasound use x-rays?", "No, it uses sound."),
    ("Does magnetic resonance imaging use x-rays?", "No, it uses a magnetic field and radio waves."),
    ("Does computed tomography use x-rays?", "Yes, from many sides."),
    ("Why is air dark on an x-ray?", "Air hardly absorbs x-rays."),
    ("Why is bone bright on an x-ray?", "Bone absorbs more x-rays than soft tissue does."),
    ("What does colour mean in doppler ultrasound?", "Moving blood and its direction."),
    ("Name three kinds of microscopy image.", "Histology, immunohistochemistry and fluorescence microscopy."),
    ("Name two kinds of x-ray.", "Chest x-ray and bone x-ray."),
    ("Thank you", "You are welcome."),
)
"""Questions without an image, and their answers."""

ASK_KIND = ("What does {} mean?", "Explain the term {}.", "What is typical of {}?", "How is {} made?")
"""Questions about a kind, without an image."""


def explained(kind: Kind) -> tuple[str, ...]:
    """The answers to ASK_KIND, in its order."""
    return (kind.kind[1].replace("The image", "It", 1), kind.signal[0], kind.look[0], kind.made[0])


def reports(kind: Kind) -> tuple[str, ...]:
    """Findings: kind, view and a typical structure, in a sentence each."""
    return tuple(f"{kind.kind[0]} {kind.view[0]} {look}" for look in kind.look)


def named(answer: str) -> str | None:
    """The kind that an answer names, the longest if several; None if it names none."""
    found = [kind.label for kind in KINDS if kind.label in answer.lower()]
    return max(found, key=len, default=None)


def texts() -> Iterator[str]:
    """Every question and statement once: what the tokenizer is trained on."""
    for questions in (*TOPICS.values(), REPORT, PAIR, SYSTEM, ASK_KIND):
        yield from questions
    for kind in KINDS:
        yield kind.label
        for topic in TOPICS:
            yield from kind.answers(topic)
    for question, answer in GENERAL:
        yield question
        yield answer
