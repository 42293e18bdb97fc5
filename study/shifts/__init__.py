"""What changes of scanner, protocol or export cost: the changes, and the study that measures them."""
