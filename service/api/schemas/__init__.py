"""Schemas of HTTP: pydantic models that validate a request and describe it in the OpenAPI document.

parameter_types  single parameters: dates, masks, boxes, outputs, subscriber
geojson          points and polygons of a request
forms            parameters of each task, beside the files of a multipart request
request_bodies   JSON bodies: named files, STAC items, series, executions
response_bodies  JSON bodies of responses
validation       reads a form or a body into these models; messages of `invalid_request`
"""
