"""The globals that the files of a checkpoint may name, as deepspeed 0.19.8 and torch 2.13 write them.

None of them runs what it is given: they make tensors, arrays, numbers, and records of fields.
"""

# What torch.load(weights_only=True) takes by itself, as far as states are made of it.
TENSORS = {
    "_codecs.encode",
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.set",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage",
    *(
        f"torch.{kind}Storage"
        for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    ),
    *(
        f"torch.{dtype}"
        for dtype in (
            *("bfloat16", "bool", "float16", "float32", "float64", "half", "int16", "int32", "int64", "int8"),
            *("uint16", "uint32", "uint64", "uint8", "float8_e4m3fn", "float8_e5m2"),
        )
    ),
}
# The random state of numpy, before and after numpy 2 moved it.
ARRAYS = {
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
}
# The states that DeepSpeed's engines save.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
# The index of torch.distributed.checkpoint.
DISTRIBUTED = {
    "pathlib.PosixPath",
    "torch.Size",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    *(name for name in TENSORS if name.startswith("torch.") and name[6:].islower() and "." not in name[6:]),
}
# training_args.bin, which is saved for the reader and which nothing loads.
ARGUMENTS = {
    "accelerate.state.PartialState",
    "accelerate.utils.dataclasses.DeepSpeedPlugin",
    "accelerate.utils.dataclasses.DistributedType",
    "accelerate.utils.dataclasses.ParallelismConfig",
    "accelerate.parallelism_config.ParallelismConfig",
    "datetime.timedelta",
    "trainer_ext.arguments.CustomTrainingArguments",
    "transformers.debug_utils.DebugOption",
    "transformers.integrations.deepspeed.HfDeepSpeedConfig",
    "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig",
    "transformers.trainer_pt_utils.AcceleratorConfig",
    "transformers.trainer_utils.EvaluationStrategy",
    "transformers.trainer_utils.FSDPOption",
    "transformers.trainer_utils.HubStrategy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.training_args.OptimizerNames",
    "transformers.training_args.ParallelMode",
    "transformers.training_args.TrainingArguments",
    "transformers.training_args_seq2seq.Seq2SeqTrainingArguments",
}
