"""Tests of Triton kernels on a CPU. They need Triton's interpreter from the start of the process: test_interpreted.py
beside this folder runs them in one of their own, and no other process collects them.
"""

from sora_fast import env

collect_ignore_glob = [] if env.interpreted() else ["test_*.py"]


def _patch_once():
    """Triton's interpreter patches triton.language when a launch starts, and searches it all again for each device function
    that is called, a third of these tests' time. The launch's patch holds until it has ended, so that search is left out.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = once


def _no_unheard_overflow_checks():
    """Each integer operation is worked out again in int64, in a dozen operations of the interpreter, for an assertion that
    it drops outside debug mode: a third of these tests' time for nothing.
    """
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if env.interpreted():
    _patch_once()
    _no_unheard_overflow_checks()
