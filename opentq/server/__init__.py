"""`opentq serve`: an OpenAI-compatible server with continuous batching on the compressed cache.

The way of a request: `app` (routes, limits, keys) reads it, `openai`, `responses` or `anthropic` turns it into a
`GenerationRequest`, `prompt` into tokens, `admission` prices it in bytes before any work, `engine` (one thread, all of
the model's work) reads the prompt in equal chunks between the steps of the running answers, `prefix` remembers what was
read, `output` turns tokens into text, reasoning and tool calls, and `stream` sends them.
"""
