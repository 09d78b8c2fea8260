"""Turn a dense language model into a sparse Mixture-of-Experts, and distil a larger teacher into it."""
