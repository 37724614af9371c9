"""How a model is judged: benchmark files, answers, scoring rules, reports, the probes' solver."""
