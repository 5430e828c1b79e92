"""All of HTTP: routes, schemas, uploads, middleware, problems."""
