"""The code file that MLflow keeps with a registered model; it is run, not imported, on loading."""

from mlflow.models import set_model

from cellray.infer.predict import Annotator

set_model(Annotator())
