"""The processes: ingest, agent worker, model worker, the command line, the embedded stack."""
