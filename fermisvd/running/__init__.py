"""How a model is run where it is larger than memory or a process: block by block, streamed, by several processes."""
