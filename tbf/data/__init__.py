"""Text -> tokenizer -> shards on disk -> packed rows -> masked batches. Knows nothing of the model or the trainer."""
