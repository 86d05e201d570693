"""Text in and out: tokenizers, and text as it is written."""
