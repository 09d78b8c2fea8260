"""What the model is before its first step: the beginning of every curve and picture of validation."""

import lightning


class ValidateFirst(lightning.Callback):
    """Validate once before the first optimizer step, as step 0.

    Every metric and every monitor then has a value to be compared with. Costs one validation; a run that goes on from
    a checkpoint has had its own. Training is the same with it and without: each step seeds itself.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate, as Lightning does between two steps."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if trainer.global_step > 0 or loop.skip:
            return
        results = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = results
