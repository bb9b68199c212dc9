"""Models and their loss, attention, compilation, FLOPs and sampling."""
