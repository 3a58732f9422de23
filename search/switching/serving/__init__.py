"""An OpenAI-compatible HTTP server over a `Writer`: `server.serve` runs it, `app.make_app` is the application.

A request's way: `wire` (bytes, timeouts) -> `gate` (host, key, log, last resort) -> `app` (routes) -> `body` (size,
JSON) -> `protocol` (fields) -> `desk` (one generation at a time) -> `answers` (shapes).
"""
