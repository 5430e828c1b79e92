"""Windows to predictions: ONNX sessions, batches, patches of imagery.

engine      the bundles and the callers' own models, loaded
session     ONNX Runtime: execution provider, precision, memory
model       batches: their sizes on CPU and GPU, out of memory, retries
cpus        CPUs that the process may use
patches     patches of imagery, their overlaps, cloud-free composites
smooth      probabilities smoothed by their neighbourhood
plots       recurrence plots for display
attribution how much each date mattered
"""
