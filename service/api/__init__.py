"""All of HTTP: routes, schemas, uploads, middleware, problems.

connection   http_protocol (limits on heads and connections), middleware
admission    auth (API keys), quotas (429), admission (503), disconnect
request      uploads (forms, JSON bodies), schemas/ (forms and bodies, and their validation),
             json_pieces, negotiation (`Accept`, `Prefer`)
routes       routes/, one module per group of paths
response     responses, sending (files, `Range`), problems (errors), results (OGC)
state        app (created), dependencies (passed to the routes), scratch (temporary files)
description  openapi, processes (OGC), stac
"""
