"""Training modules, and the surgery that makes a dense model sparse."""
