"""A desktop program around edgemoe, in Qt: run it with `python -m examples.desktop [MODEL]` in a checkout.

It needs PySide6_Essentials. `engine_thread.py` is the part to copy: how an engine is used without blocking a window.
"""
