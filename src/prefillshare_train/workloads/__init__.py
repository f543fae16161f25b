"""Agent sessions, load generation and reports: what a serving engine is measured with.

Import from the modules: `sessions` (ReAct, Reflexion and uniform sessions), `lengths` (how long
their parts are), `trace` (recording and replay), `client` and `http_client` (what is driven),
`driver` (the load), `points` (resumable load points), `reuse` (the workload's own limits),
`metrics`, `report` and `plots`.
"""
