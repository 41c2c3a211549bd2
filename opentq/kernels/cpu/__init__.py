"""The CPU: C++ sources, the library made of them, its storage layouts and its attention."""
