"""Images and masks: find, pair, split, decode, cache and write them."""
