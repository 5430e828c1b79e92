"""Kits that tests share: stacks and scenes, series, clients, jobs."""

import sys

# Moto needs boto3, which rasterio uses where it finds it: to make a session takes 15 ms in each
# call of rasterio while there are credentials for S3. The images have no boto3. pytest has imported
# rasterio before this, for the warnings in its settings.
sys.modules.setdefault("boto3", None)  # type: ignore[arg-type]  # None: cannot be imported
if "rasterio.session" in sys.modules:
    vars(sys.modules["rasterio.session"])["boto3"] = None
