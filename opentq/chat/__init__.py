"""`opentq chat`: a conversation in the terminal, on one set of compressed caches.

`conversation` holds messages and caches, `console` is the loop with its commands, `style` a little Markdown, `command`
the command line.
"""
