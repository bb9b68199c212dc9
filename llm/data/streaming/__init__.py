"""Train on a data set while another process still tokenizes it."""
