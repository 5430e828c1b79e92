"""GeoTIFFs to windows of reflectance: headers → stack → windows.

files       containers (zips), metadata (XML and JSON beside rasters), references (hrefs),
            stac_files
headers     tiff_guard and jp2_guard (limits), geotiff (GDAL)
meaning     sensors, band_names, dates, layouts → arrange (file of each band and date)
numbers     reflectance (scale and offset as stated), radiometry (as the pixels show)
grid        placement → warp
stack       `stack.open_stack` composes these
windows     reader (values, validity), masks and clouds (cloud masks), buffers (memory)
remote      connect (allowed hosts), blocks and on_demand (HTTP ranges)
polygons    vector_guard (limits), vectors
"""
