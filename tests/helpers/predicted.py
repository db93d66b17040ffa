"""What ours is compared with: the model that was trained, and rows out of a request of tensors."""


def evaluated(run, dataset, split):
    """Probabilities by the sharded model that `dlrm evaluate` builds, float32 [rows]."""
    import torch

    from torchdlrm.loader.loader import Loader
    from torchdlrm.training.checkpoint import find_checkpoint
    from torchdlrm.training.checkpointer import Checkpointer
    from torchdlrm.training.processes.process_group import join_process_group
    from torchdlrm.training.run import Run
    from torchdlrm.training.sharded import build_sharded_model

    run = Run.open(run)
    with join_process_group() as ranks:
        model = build_sharded_model(
            run.config,
            run.shape(dataset),
            dense_sample=None,
            ranks=ranks,
        ).module
        checkpointer = Checkpointer(run.checkpoints, model, None, ranks)
        checkpointer.load(find_checkpoint(run.checkpoints).step)
        checkpointer.close()
        model.eval()
        with torch.no_grad():
            logits = [
                model(batch)[1][1]
                for batch in Loader(dataset, split, batch_size_global=500, tables=run.shape(dataset).tables)
            ]
    return torch.cat(logits).sigmoid().numpy()


def rows_of_request(tensors, schema, max_rows):
    """The rows of a request of the Open Inference Protocol that holds these tensors."""
    from torchdlrm.serving.front.open_inference.columns import Inputs, rows_of_tensors

    inputs = Inputs(schema, max_rows, len(tensors))
    for tensor in tensors:
        inputs.place(tensor.name, tensor.datatype, tensor.shape)
    return rows_of_tensors(tensors, inputs)
