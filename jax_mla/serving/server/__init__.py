"""The engine behind the HTTP API of OpenAI; needs the `serve` extra.

protocol.py   bodies of requests to what the engine takes; what is refused
responses.py  what is answered: objects, chunks, errors
choice.py     tokens of one continuation to text, up to its stop string
answer.py     one request from submission to its last byte, or until its client is gone
metrics.py    numbers for Prometheus
app.py        routes, keys, limits
page.html     the web page
"""
