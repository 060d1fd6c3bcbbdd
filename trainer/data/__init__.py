"""From rows of a dataset to tokens: files, row formats, chat templates, the vocabulary that both models share, and the
seeded stream of prompts with its cursor."""
