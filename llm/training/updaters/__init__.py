"""One weight update: the `Updater` protocol and its implementations."""
