"""The OpenAI-compatible endpoint in front of the ensemble: `python -m gateway.serve`.

    body ─► chat_request ─► service_request ─► Engine.stream ────► event_stream (server-sent events)
            (OpenAI's form) (the service's)    Engine.generate_n ► completion   (one JSON object)

The HTTP side knows only the Protocol `Engine`; `internvl_triton.client.AsyncClient` is one.
"""
