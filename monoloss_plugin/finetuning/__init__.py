"""MonoLoss as a regularizer while you fine-tune a vision model: what the adapters share.

Needs torch alone. In a loop of your own, put a :class:`MonoLayer` before the classifier, record its
output with a :class:`LatentRecorder`, and add ``loss(recorder.take(), embeddings)`` to your loss.
"""

from monoloss_plugin.finetuning.embeddings import WithEmbeddings, aligned_embeddings
from monoloss_plugin.finetuning.gathering import gather_rows
from monoloss_plugin.finetuning.loading import load_with_mono_layer
from monoloss_plugin.finetuning.mono_layer import MonoHead, MonoLayer, insert_mono_layer
from monoloss_plugin.finetuning.recorder import LatentRecorder

__all__ = [
    "LatentRecorder",
    "MonoHead",
    "MonoLayer",
    "WithEmbeddings",
    "aligned_embeddings",
    "gather_rows",
    "insert_mono_layer",
    "load_with_mono_layer",
]
