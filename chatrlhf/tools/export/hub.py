"""A model's folder on the Hugging Face hub: only where somebody asks for it, and private unless they say otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError, UserError
from chatrlhf.models.loading.lora import ADAPTER_CONFIG
from chatrlhf.runtime.atomic_files import CONTENTS
from chatrlhf.runtime.whole_folders import require_whole
from chatrlhf.tools.export.model_card import model_card
from chatrlhf.tools.export.provenance import origin_of
from chatrlhf.tools.export.weights import refuse_link_out

TOKEN = "HF_TOKEN"
CARD = "README.md"
MOST_SAID = 300  # characters of what the hub answers to a refusal
MADE_BY_THE_HUB = {".gitattributes"}  # in a repository in which no one has put anything


class Repository:
    """One repository of models."""

    def __init__(self, name: str, public: bool = False, update: bool = False) -> None:
        """
        Args:
            public: everybody may read it.
            update: it may hold files already; those of the same names are replaced by a commit, but for its card.

        Raises:
            ConfigError: the name is none, or there is no token in the environment.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(f"--push-to-hub: {name!r} is no name of a repository ({error})") from None
        self._token = os.environ.get(TOKEN, "").strip()
        if not self._token:
            raise ConfigError(
                f"--push-to-hub: set {TOKEN} to a token that may write to {name}; it is read nowhere else"
            )
        self.name, self.public, self.update = name, public, update
        self._api: Any = HfApi(token=self._token)

    def check(self) -> None:
        """That the token is one, and that nothing is in the way; nothing is made.

        Raises:
            ConfigError: the repository holds files, or is public, and no one said that this is wanted.
            UserError: the hub refuses, or cannot be reached.
        """
        with self._explained():
            self._api.whoami()
            if self._api.repo_exists(self.name):
                self._refuse_what_is_there()

    def push(self, folder: Path) -> str:
        """Upload a folder's files in one commit, with a model card where it has none; returns its address.

        Raises:
            ConfigError: there are no weights in it, or a link out of it; or as `check`.
            WeightsError: a run has left the folder, and it is not what it was.
            UserError: the hub refuses, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd

        require_whole(folder)
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {name: path for name, path in files.items() if name != CONTENTS and not path.name.startswith(".")}
        if not any("/" not in name and name.endswith((".safetensors", ".bin")) for name in files):
            raise ConfigError(f"{folder} has no weights (*.safetensors); name the folder of a model")
        for path in files.values():
            refuse_link_out(path, folder)
        with self._explained():
            self._api.create_repo(self.name, private=not self.public, exist_ok=True)
            there = self._refuse_what_is_there()
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            if CARD not in files and CARD not in there:
                card = model_card(self.name, origin_of(folder), (folder / ADAPTER_CONFIG).exists())
                operations.append(CommitOperationAdd(CARD, card.encode()))
            self._api.create_commit(self.name, operations, commit_message="Upload a model by chatrlhf")
        return f"{self._api.endpoint}/{self.name}"

    def _refuse_what_is_there(self) -> set[str]:
        """The files of the repository."""
        info = self._api.model_info(self.name)
        there = {file.rfilename for file in info.siblings or []} - MADE_BY_THE_HUB
        if not info.private and not self.public:
            raise ConfigError(f"--push-to-hub: {self.name} is there and public; name another one, or add --public")
        if there and not self.update:
            raise ConfigError(
                f"--push-to-hub: {self.name} holds {len(there)} files already ({sorted(there)[0]}, ...); name a new "
                "repository, or add --update"
            )
        return there

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the hub or the way to it says, in one line and without the token."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled:
            raise ConfigError("--push-to-hub: HF_HUB_OFFLINE is set, so the hub is not asked; unset it") from None
        except UserError:
            raise
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"--push-to-hub: {self.name}: {self._said(error)}") from None
        except Exception as error:  # of the HTTP client, whichever huggingface_hub has
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
                raise
            reason = f"the hub at {self._api.endpoint} cannot be reached ({self._said(error)})"
            raise UserError(f"--push-to-hub: {reason}") from None

    def _said(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        return text.replace(self._token, "***")[:MOST_SAID]
