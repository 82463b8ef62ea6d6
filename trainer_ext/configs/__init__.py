"""The DeepSpeed and FSDP configs that come with the package."""
