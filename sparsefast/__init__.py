"""**sparsefast** trains networks in which most weights are zero from the first step to the last, while the pattern moves to where it is needed: dynamic sparse training, as in SET, SNFS and RigL. You add two lines to a
fastai script, or replace one in a PyTorch loop, and end with a model of a tenth or a twentieth of the weights, in a file as small, that computes on these weights only.

Modules:

- `sparsefast.allocation`: How a number of drops, or of new weights, is shared out among the layers of a model
- `sparsefast.attach`: Sparse training where the loop is somebody else's, by the optimizer's own hooks
- `sparsefast.callback`: Dynamic sparse training in a fastai `Learner`
- `sparsefast.checkpoint`: A training that is stopped, by you or by a power cut, goes on as if nothing had happened
- `sparsefast.cli.bench`: `sparsefast_bench`: is it faster sparse, on this machine? One line in a shell
- `sparsefast.cli.console`: What the commands share: values that are checked, and errors that are one line
- `sparsefast.cli.datasets`: Images to try things on, by name or from folders
- `sparsefast.cli.models`: Two small networks, and all that torchvision and timm have
- `sparsefast.cli.train`: `sparsefast_train`: a sparse model and its dense twin, from one line in a shell
- `sparsefast.core`: Neural networks that are sparse from the first step: masks, distributions, drop and grow, and the callback that runs it all in fastai
- `sparsefast.distributions`: How the sparsity of a model is shared out among its layers
- `sparsefast.masks`: Which weights of a layer are active: boolean masks kept beside the parameters they belong to
- `sparsefast.methods`: Dynamic sparse training, for any PyTorch loop: what a method is, when it acts, and what it does around the optimizer's step
- `sparsefast.patterns`: Which masks are allowed: any, N of each M, blocks, or as many in every row
- `sparsefast.presets`: Published methods, each a dict of functions and numbers
- `sparsefast.ranks`: Several processes, one set of masks
- `sparsefast.rewire`: One update of the masks: prune or revive, drop, grow, and make weights and optimizer state follow
- `sparsefast.saliency`: Which weights matter, seen before training: SNIP, GraSP and SynFlow
- `sparsefast.schedules`: How a number changes while a network trains: the share of weights replaced at an update, and sparsity itself
- `sparsefast.scores`: Which weights to drop and which to grow, and what grown ones start from
- `sparsefast.see.analysis`: What a sparse model consists of: a table to read, and the same as data
- `sparsefast.see.doctor`: Is everything with this sparse model as it should be? If not: what is wrong, where, and what to do
- `sparsefast.see.flops`: What a forward pass costs, dense and with masks, and what a whole training costs
- `sparsefast.see.plots`: Pictures of sparse models, of their training, and of many runs
- `sparsefast.see.recorder`: What happens to the masks while a model trains, step by step, and what it costs
- `sparsefast.select`: Which weights can be sparse, and naming them: by name, type, place, or the module itself
- `sparsefast.ship.deploy`: Each layer in the form that is fastest here: measured, not guessed
- `sparsefast.ship.export`: The model for other runtimes: zeros baked in, no masks, no hooks
- `sparsefast.ship.files`: A checkpoint as small as its model is sparse: active weights, and where they are
- `sparsefast.ship.shrink`: Units without a weight, and units that nobody listens to, are cut out for good
- `sparsefast.sparsify`: From a dense model to a sparse one, and back
- `sparsefast.storage.base`: What `SparseLinear` and `SparseConv2d` share: the stored weights and their index, the differentiable product, and the state
- `sparsefast.storage.conv`: `SparseConv2d`: a convolution that stores and multiplies its active weights only, forward and backward
- `sparsefast.storage.convert`: `to_sparse_layers` compresses the layers of a masked model where that wins; `to_masked_layers` gives the masked model back
- `sparsefast.storage.kernels`: Matrix products that touch active weights only, from PyTorch's own operations
- `sparsefast.storage.linear`: `SparseLinear`: a linear layer that stores and multiplies its active weights only, forward and backward
- `sparsefast.storage.update`: What the engine asks a compressed layer for: the gradient of all weights, the dense form for a score, and a new set of active weights
- `sparsefast.utils`: Small helpers that several rooms need: checks of arguments, tables, files, and the module inside what a user gives"""

__version__ = "0.1.0"

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_wings = dict(see=['flops', 'analysis', 'recorder', 'plots', 'doctor'], ship=['files', 'shrink', 'deploy', 'export'],
              cli=['console', 'datasets', 'models', 'bench'])
_moved = {f'sparsefast.{m}': f'sparsefast.{wing}.{m}' for wing,ms in _wings.items() for m in ms}
_moved['sparsefast.sparse_ops'] = 'sparsefast.storage.kernels'
_moved['sparsefast.layers'] = _moved['sparsefast.storage.layers'] = 'sparsefast.storage'

class _Moved(MetaPathFinder, Loader):
    "Import modules by the paths they had before they moved into wings"
    def find_spec(self, name, path=None, target=None): return ModuleSpec(name, self) if name in _moved else None
    def create_module(self, spec): return None
    def exec_module(self, module): sys.modules[module.__name__] = import_module(_moved[module.__name__])

sys.meta_path.append(_Moved())

def __getattr__(name):
    "Import `core` when one of its names is asked for, so that `import sparsefast` alone stays quick"
    if name.startswith('_'): raise AttributeError(name)
    core = import_module('sparsefast.core')
    if name in core.__all__: return getattr(core, name)
    raise AttributeError(f"module 'sparsefast' has no attribute {name!r}")

def __dir__(): return sorted({*globals(), *import_module('sparsefast.core').__all__})
