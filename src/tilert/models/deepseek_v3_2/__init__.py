"""Names under which the public TileRT package offers DeepSeek-V3.2, so that its scripts run unchanged.

Nothing is built here: the model family is models/deepseek_v32.py, and what the names stand for is in serve.
It is the one place below `models` that may import `serve`, and nothing may import it.
"""
