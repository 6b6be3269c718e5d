"""What is called around training steps: metrics, progress line, inline scoring, and classes of the user's own.

`callback.Callback` says what may be called; `trainer/loop.py` does it by `dispatch.Callbacks`. None of them changes
what is trained.
"""
