# The public names, for type checkers and for the lazy loader of __init__.py, which reads them from here.

from .arch.rules import ScalingRule as ScalingRule
from .arch.scaling import scale as scale
from .arch.spec import NetSpec as NetSpec
from .arch.spec import load_spec as load_spec
from .arch.spec import save_spec as save_spec
from .arch.zoo import get_spec as get_spec
from .arch.zoo import list_models as list_models
from .artifact.answers import Answer as Answer
from .artifact.artifact import load_artifact as load_artifact
from .artifact.facts import write_promise as write_promise
from .artifact.promise import Promise as Promise
from .choice.carried import write_kit as write_kit
from .choice.choose import choose as choose
from .conditions import Conditions as Conditions
from .conditions import Constraint as Constraint
from .cost.counting import count as count
from .detect.data import open_boxes as open_boxes
from .detect.evaluate import evaluate_detector as evaluate_detector
from .detect.train import train_detector as train_detector
from .errors import UserError as UserError
from .images.check import check_data as check_data
from .images.preprocess import Preprocessing as Preprocessing
from .images.sources import open_dataset as open_dataset
from .learn.evaluate import evaluate as evaluate
from .learn.train import train as train
from .maps.explain import explain as explain
from .maps.result import Maps as Maps
from .nas.coefficients import find_scaling as find_scaling
from .nas.result import Study as Study
from .nas.space import SearchSpace as SearchSpace
from .nas.spaces import get_space as get_space
from .nas.study import search as search
from .networks.detectors import create_detector as create_detector
from .nn.detectors import DetectorSpec as DetectorSpec
from .nn.net import create_model as create_model
from .nn.norm import convert_norm as convert_norm
from .nn.weights import export_weights as export_weights
from .nn.weights import load_weights as load_weights
from .pipeline.run import fit as fit
from .predictor.calibrate import Observation as Observation
from .predictor.calibrate import calibrate as calibrate
from .predictor.calibration import load_calibration as load_calibration
from .predictor.calibration import save_calibration as save_calibration
from .predictor.largest_batch import predict_largest_batch as predict_largest_batch
from .predictor.predict import Prediction as Prediction
from .predictor.predict import predict as predict
from .ship.confirm import Confirmation as Confirmation
from .ship.confirm import confirm as confirm
from .ship.confirm import promise_of as promise_of
from .ship.export import export as export
from .ship.forms import export_fastest as export_fastest
from .ship.stream import classify as classify
from .ship.tune import tune as tune
from .ship.verify import verify as verify
from .speed.measuring import measure as measure
from .speed.saved import saved_bytes as saved_bytes
from .speed.timing import Measurement as Measurement

__version__: str
__all__ = [
    "Answer",
    "Conditions",
    "Confirmation",
    "Constraint",
    "DetectorSpec",
    "Maps",
    "Measurement",
    "NetSpec",
    "Observation",
    "Prediction",
    "Preprocessing",
    "Promise",
    "ScalingRule",
    "SearchSpace",
    "Study",
    "UserError",
    "__version__",
    "calibrate",
    "check_data",
    "choose",
    "classify",
    "confirm",
    "convert_norm",
    "count",
    "create_detector",
    "create_model",
    "evaluate",
    "evaluate_detector",
    "explain",
    "export",
    "export_fastest",
    "export_weights",
    "find_scaling",
    "fit",
    "get_space",
    "get_spec",
    "list_models",
    "load_artifact",
    "load_calibration",
    "load_spec",
    "load_weights",
    "measure",
    "open_boxes",
    "open_dataset",
    "predict",
    "predict_largest_batch",
    "promise_of",
    "save_calibration",
    "save_spec",
    "saved_bytes",
    "scale",
    "search",
    "train",
    "train_detector",
    "tune",
    "verify",
    "write_kit",
    "write_promise",
]
