"""From text to blocks of tokens: sources, tokenized streams, order, loaders."""
