"""**sparsefast** trains neural networks in which most weights are zero from the first step to the last. While the network trains, weak connections are dropped and promising ones are grown: dynamic sparse training, as in SET, SNFS, RigL and many later methods.

Add two lines to a fastai script, or change one line of a PyTorch loop. The result is a model with a tenth or a twentieth of the weights. Three more lines make its file equally small, and compute with these weights only.

Modules:

- `sparsefast.all`: Every public name that scripts use, in one import
- `sparsefast.allocation`: How drops and new weights are distributed over the layers of a model
- `sparsefast.amounts`: How many weights each layer drops, grows, and should have
- `sparsefast.attach`: Sparse training in loops that you cannot change, by the optimizer's own hooks
- `sparsefast.average`: The masks of a model for an average of its weights, or for its target network
- `sparsefast.calibration`: How large the inputs of each layer are, collected from a few batches
- `sparsefast.callback`: Dynamic sparse training in a fastai `Learner`
- `sparsefast.cautions`: What `sparsify_model` warns of before it changes a model
- `sparsefast.checkpoint`: Save a run after each epoch, and resume it bit for bit
- `sparsefast.checks`: What can be wrong with a sparse model and its method, each in one place: `method.check` raises it, the doctor reports it
- `sparsefast.cli.bench`: `sparsefast_bench`: measure from the shell whether sparse is faster on this machine
- `sparsefast.cli.commands`: `sparsefast_train` and `sparsefast_bench`: their options, and their entries in a shell
- `sparsefast.cli.console`: Checks of values and one-line errors, shared by the commands
- `sparsefast.cli.datasets`: Small image data sets by name, and images from folders
- `sparsefast.cli.models`: Two small networks, and every model of torchvision and timm
- `sparsefast.cli.options`: What `sparsefast_train` accepts: names, defaults, and checks of every value
- `sparsefast.cli.outcome`: What a sparse model has gained over its dense twin: accuracy, file, speed and time of training
- `sparsefast.cli.train`: `sparsefast_train`: train a sparse model and its dense twin from the shell
- `sparsefast.copies`: Which model a copy was made from, and whether it has become an average with outdated masks
- `sparsefast.core`: Neural networks that are sparse from the first step: masks, distributions, drop and grow, and the callback that runs it all in fastai
- `sparsefast.distributions`: How the sparsity of a model is distributed over its layers
- `sparsefast.draws`: Scores made of scores: draws by a score, weights that may not return, and growth in a random subset
- `sparsefast.exchange`: Drop and grow weights of one layer by its scores
- `sparsefast.exploration`: Weights that train although the forward pass does not use them: the dense store of Top-KAST and SR-STE
- `sparsefast.find`: Every sparse weight of a model, as the engine sees it
- `sparsefast.findings`: What a check is: a function of a `Case` that yields findings
- `sparsefast.gradients`: What an update needs of gradients: averages over steps, a copy that is kept after a step, and whether all are finite
- `sparsefast.groups`: Patterns of whole rows, channels, kernels, heads, diagonals, or shuffled blocks
- `sparsefast.guard`: Forward-pre-hooks that mask weights before they are used, whatever was written into them from outside
- `sparsefast.importance`: Which weights of a trained model matter, judged by their size and by the size of their inputs: Wanda, RIA and OWL
- `sparsefast.layer`: One sparse weight, and everything that a method may read from it or do to it
- `sparsefast.learning_rates`: Learning rates for sparse training: a warm-up after each update, and rates by density
- `sparsefast.loading`: Checks of what a sparse model gets its masks from: a state that is loaded
- `sparsefast.loops.base`: Masks before training, one method at a time, and the figures for a trainer's log
- `sparsefast.loops.hf`: A callback for the `Trainer` of transformers, and `from_pretrained` with masks
- `sparsefast.loops.lightning`: A callback for Lightning's `Trainer`
- `sparsefast.masks`: Which weights of a layer are active: boolean masks next to the parameters they belong to
- `sparsefast.memory`: What a method remembers between steps, and how it is saved with the optimizer
- `sparsefast.method`: What a method of dynamic sparse training is: a handful of functions and numbers, and what follows from them about time
- `sparsefast.methods`: Dynamic sparse training in any PyTorch loop: when a method acts, and what it does around the optimizer's step
- `sparsefast.naming`: A function for each preset, and a name for each method
- `sparsefast.noted`: Which weights had masks when they were made, and checks that they still have them
- `sparsefast.one_shot`: Cut a trained model without training, block by block or all at once, by scores that look at data
- `sparsefast.ops`: The compiled loops, if there are any, and how operations of PyTorch are defined
- `sparsefast.optim`: Everything that depends on the shape of an optimizer: its parameters, its state, and how state is reset
- `sparsefast.patterns`: Which masks a layer may have: any, N of each M weights, blocks, or the same number in every row
- `sparsefast.pieces`: A tensor of which every process has a piece: cut it, gather it, and look at the own piece
- `sparsefast.plan`: Every new mask of an update, computed before anything is written
- `sparsefast.presets`: Published methods, each as a dict of settings and as a function that returns the method
- `sparsefast.ranks`: The same masks in every process of a data-parallel training
- `sparsefast.resets`: What the optimizer remembers of weights that come and go
- `sparsefast.rewire`: One update of the masks: plan it, then write masks, weights and optimizer state
- `sparsefast.saliency`: Which weights to train, judged before training: SNIP, GraSP and SynFlow
- `sparsefast.schedules`: How a number changes during training: the drop fraction, or sparsity itself
- `sparsefast.scores`: Which weights to drop and which to grow, and what grown ones start from
- `sparsefast.see.analysis`: The layers of a sparse model, as a table to read and as data
- `sparsefast.see.doctor`: What is wrong with a sparse model, where, and what to do about it
- `sparsefast.see.figures`: Colours, axes and scales of all figures, and a figure of many runs
- `sparsefast.see.flops`: What a forward pass costs, dense and with masks, and what a whole run costs
- `sparsefast.see.mask_checks`: Masks that are broken, lost or different from what they should be: the half of the doctor that looks at masks
- `sparsefast.see.plots`: Figures of sparse models and of their training
- `sparsefast.see.recorder`: What happens to the masks while a model trains, step by step, and what it costs
- `sparsefast.see.summaries`: `learn.sparse_summary()` and `learn.summary()`: how sparse the layers of a learner are
- `sparsefast.select`: Which weights can be sparse, and how to name them: by name, type, position, or the module itself
- `sparsefast.serialize`: A method as plain lists, dicts, names and numbers, and back
- `sparsefast.settings`: Checks of a method's settings, before anything runs
- `sparsefast.sharded`: The layer of a model that `fully_shard` has cut up: of its weight each process has a piece
- `sparsefast.ship.chains`: Layers whose outputs are used only by other layers, channel by channel: where units can be cut
- `sparsefast.ship.channels`: Remove the weakest channels while a model trains, and continue with a smaller one
- `sparsefast.ship.codes`: Masks in a bit per weight or less, and tensors as their values on a mask
- `sparsefast.ship.deploy`: Each layer in the form that is fastest here: measured, not guessed
- `sparsefast.ship.export`: The model for other runtimes: zeros baked in, no masks, no hooks
- `sparsefast.ship.files`: Checkpoints as small as the model is sparse: active weights and their positions, in safetensors
- `sparsefast.ship.fold`: Batch norms, residual additions and ReLUs computed inside the layers before them
- `sparsefast.ship.forms`: Layers that compute what a masked layer computes, in a form of their own
- `sparsefast.ship.graph`: Which batch norms, additions and ReLUs follow which layers
- `sparsefast.ship.hub`: A sparse model in a folder, with a model card that a hub shows
- `sparsefast.ship.lora`: Adapters that are trained on a sparse model, and merged into it without filling its zeros
- `sparsefast.ship.optim_state`: An optimizer's state as tensors and a description, checked before it is loaded
- `sparsefast.ship.shrink`: Cut out units that have no weights, and units whose output nothing uses
- `sparsefast.ship.timing`: Compare the speed of functions on a computer with other work running
- `sparsefast.sparsify`: From a dense model to a sparse one, and back
- `sparsefast.storage.base`: What compressed layers share: the stored weights and their index, the differentiable product, and the state
- `sparsefast.storage.conv`: `SparseConv2d` and `SparseConv1d`: convolutions that store and multiply their active weights only, forward and backward
- `sparsefast.storage.convert`: `to_sparse_layers` compresses the layers of a masked model where that wins; `to_masked_layers` gives the masked model back
- `sparsefast.storage.kernels`: Matrix products that touch active weights only: a compiled kernel, or PyTorch's own operations without it
- `sparsefast.storage.linear`: `SparseLinear`: a linear layer that stores and multiplies its active weights only, forward and backward
- `sparsefast.storage.planes`: Convolutions as sparse products: how images are laid out in planes of pixels, and where each active weight begins to read
- `sparsefast.storage.update`: What the engine asks a compressed layer for: the gradient of all weights, the dense form for a score, and a new set of active weights
- `sparsefast.targets`: Which weights become sparse, and how sparse
- `sparsefast.tokens`: What goes into a layer and what comes back, summed over examples and positions
- `sparsefast.topk`: Exact selection of the k highest scores among some candidates, without sorting a layer
- `sparsefast.topology`: Growth from the mask alone: where a network has many short paths between an input and an output, a link is missing
- `sparsefast.training_time`: A point in training: an optimizer step and the total number of steps
- `sparsefast.utils`: Small helpers that several modules need: checks of arguments, tables, files, and unwrapping models"""

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
