"""transformers, or a clear word that it is missing."""

from __future__ import annotations


def transformers():
    """The package, imported when first needed."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("corelib.hf needs transformers: pip install 'longseq-lab[hf]'") from error
    return transformers
