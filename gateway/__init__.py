"""The OpenAI-compatible endpoint in front of the ensemble: `python -m gateway.serve`.

    body ─► chat_request ─► service_request ─► Engine.stream ────► event_stream (server-sent events)
            (OpenAI's form) (the service's)    Engine.generate_n ► completion   (one JSON object)

`GET /` is a page to chat with the model; it asks the endpoint like every other client.

The HTTP side knows only the Protocol `Engine`; `internvl_triton.client.AsyncClient` is one.
"""
