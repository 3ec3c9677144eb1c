"""Other runtimes behind the same encoder: OpenVINO and ONNX Runtime, accepted only where they were measured.

`export` writes a folder that `clipworks.load` reads; `fit` does the same for one process without a folder.
"""

from .export import Refused, Report, export, fit
from .folder import ExportedEncoder, is_export, load_export

__all__ = ["ExportedEncoder", "Refused", "Report", "export", "fit", "is_export", "load_export"]
