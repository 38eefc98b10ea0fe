"""Students and drafts. Nothing here yet: distillation is the next part of the plan to land in this folder."""
