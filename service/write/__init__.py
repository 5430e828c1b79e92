"""Predictions to files: COGs, legends, polygons, tables of fields, STAC items.

    predictions   predictions as layers, records and summaries
    cog           GeoTIFFs, with the class names and colours of `legend`
    sieve         small areas of a class map joined to neighbours
    polygons      areas of a class map as GeoParquet
    fields        results per field as GeoJSON, CSV and GeoParquet
    stac_item     `item.json`

`service.api.responses` makes the HTTP response from these for the type that `Accept` requests.
"""
