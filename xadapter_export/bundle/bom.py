"""What a bundle was made of, as a CycloneDX ML-BOM.

The package ``cyclonedx-python-lib`` writes it. It says nothing of the time or the machine, so that equal
bundles give equal bytes.

Source:
    CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import NAMESPACE_URL, uuid5

from xadapter_export.bundle.card_data import BUILTIN, is_hub_id
from xadapter_export.bundle.folder import MANIFEST_NAME, Bundle, sha256_file
from xadapter_export.bundle.manifest import Manifest
from xadapter_export.errors import ConfigError, import_extra

_BUILTIN_LICENSES: Final = dict.fromkeys(("bundle", "plug-in", "plm"), "Apache-2.0") | dict.fromkeys(
    ("clip", "bank"), "Apache-2.0 AND MIT"
)


@dataclass(frozen=True)
class _Part:
    """One component of the BOM.

    Attributes:
        ref: What it is called in the BOM, and by ``--license``.
        kind: What CycloneDX calls such a part.
        name: Name, hub id or path.
        sha256: Its hash; None where nobody recorded one.
        says: What it is, and what the hash is of.
    """

    ref: str
    kind: Literal["machine-learning-model", "data", "file"]
    name: str
    sha256: str | None
    says: str


def make_bom(bundle: Bundle, licenses: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the ML-BOM of a bundle as JSON, and the parts of which no license is known.

    Args:
        bundle: The bundle.
        licenses: SPDX ids or expressions by part: ``bundle``, ``plug-in``, ``plm``, ``clip``, ``bank``, or
            ``data NAME``. Those of the built-in checkpoint are known.

    Raises:
        ConfigError: If the bundle has no such part.
        MissingExtraError: If cyclonedx-python-lib is not installed.
    """
    manifest = bundle.manifest
    manifest_sha256 = sha256_file(bundle.folder / MANIFEST_NAME)
    says, name = f"X-adapter bundle; hash of {MANIFEST_NAME}", bundle.folder.resolve().name
    whole = _Part("bundle", "machine-learning-model", name, manifest_sha256, says)
    parts = _parts(manifest)
    if unknown := licenses.keys() - {part.ref for part in (whole, *parts)}:
        known = ", ".join(part.ref for part in (whole, *parts))
        raise ConfigError("the bundle has no such part", got=min(unknown), expected=f"one of {known}")
    licenses = _known_licenses(manifest) | dict(licenses)
    files = [_Part(f"file {name}", "file", name, entry.sha256, "") for name, entry in manifest.files.items()]
    of_bom = import_extra("cyclonedx.model.bom", "bom")
    component = import_extra("cyclonedx.model.component", "bom").Component
    tools = import_extra("cyclonedx.model.tool", "bom").ToolRepository(
        components=[component(name=name, version=version) for name, version in manifest.created_with.items()]
    )
    root = _component(whole, licenses)
    components = [_component(part, licenses) for part in (*parts, *files)]
    metadata = of_bom.BomMetaData(component=root, tools=tools)
    metadata.timestamp = None  # the library would say now
    serial = uuid5(NAMESPACE_URL, f"sha256:{manifest_sha256}")
    bom = of_bom.Bom(serial_number=serial, metadata=metadata, components=components)
    bom.register_dependency(root, components)
    schema = import_extra("cyclonedx.schema", "bom")
    make = import_extra("cyclonedx.output", "bom").make_outputter
    text = make(bom, schema.OutputFormat.JSON, schema.SchemaVersion.V1_6).output_as_string(indent=2)
    return f"{text}\n", [part.ref for part in (whole, *parts) if part.ref not in licenses]


def _parts(manifest: Manifest) -> list[_Part]:
    """Return what the bundle was made from: models, bank, and texts that lossy variants were judged on."""
    plm, clip, bank, checkpoint = manifest.plm, manifest.clip, manifest.bank, manifest.checkpoint
    weights = "hash of weights and settings (xadapter-export, model.identity)"
    kind: Final = "machine-learning-model"
    parts = [
        _Part("plug-in", kind, checkpoint.source, checkpoint.sha256, f"trained X-adapter; {weights}"),
        _Part("plm", kind, plm.source, plm.sha256, f"frozen language model, {plm.family}; {weights}"),
    ]
    if clip is not None:
        parts.append(_Part("clip", kind, clip.source, clip.sha256, f"frozen CLIP text tower; {weights}"))
    if bank is not None:
        says = f"CLIP features of {bank.num_pictures} images; hash of features and captions"
        parts.append(_Part("bank", "data", "feature bank", bank.sha256, says))
    judged = [v.agreement.judged_on for v in manifest.variants if v.agreement is not None]
    names = dict.fromkeys(
        name for on in judged if on is not None for name in (on.texts, on.questions) if name
    )
    return parts + [
        _Part(f"data {name}", "data", name, None, "lossy variants were judged on it") for name in names
    ]


def _known_licenses(manifest: Manifest) -> dict[str, str]:
    """Return the licenses of a bundle of the built-in checkpoint; see NOTICE."""
    if manifest.checkpoint.source != BUILTIN:
        return {}
    is_swapped = manifest.bank is not None and manifest.bank.swapped_from is not None
    return {ref: name for ref, name in _BUILTIN_LICENSES.items() if not (ref == "bank" and is_swapped)}


def _component(part: _Part, licenses: Mapping[str, str]) -> Any:
    """Return a part as the library's component."""
    model = import_extra("cyclonedx.model", "bom")
    components = import_extra("cyclonedx.model.component", "bom")
    factory = import_extra("cyclonedx.contrib.license.factories", "bom").LicenseFactory()
    of_part, purl = licenses.get(part.ref), None
    if is_hub_id(part.name) and part.kind == "machine-learning-model":
        purl = import_extra("packageurl", "bom").PackageURL("huggingface", *part.name.split("/"))
    return components.Component(
        bom_ref=part.ref,
        type=components.ComponentType(part.kind),
        name=part.name,
        description=part.says or None,
        hashes=[model.HashType(alg=model.HashAlgorithm.SHA_256, content=part.sha256)] if part.sha256 else [],
        licenses=[] if of_part is None else [factory.make_from_string(of_part)],
        purl=purl,
    )
