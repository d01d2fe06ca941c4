"""Token ids in, token ids out: requests, KV cache, batcher, sampling. Knows no text and no HTTP."""
