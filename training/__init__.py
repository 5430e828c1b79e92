"""Makes bundles: reads data, pretrains, fine-tunes, evaluates, exports."""
