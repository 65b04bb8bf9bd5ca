"""Build commands that put our start-up files at the root of site-packages.

Python runs `pyiqa_clipkd.start` (3.15 or newer, PEP 829) or else `pyiqa_clipkd.pth`
when it starts. Both call `_hook.py`, which stands beside them under another name.
`setup.cfg` names the commands; setuptools loads this file alone, without our package.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from setuptools.command.build_py import build_py as _build_py
from setuptools.command.editable_wheel import editable_wheel as _editable_wheel

HOOK = Path(__file__).resolve().with_name('_hook.py')

# One line, and silent whatever happens: it runs in every process of the environment.
PTH = (
    'import os; exec("'
    'try:\\n'
    " if os.environ.get('PYIQA_CLIPKD_AUTOLOAD') != '0':\\n"
    '  import _pyiqa_clipkd_hook\\n'
    '  _pyiqa_clipkd_hook.start()\\n'
    'except Exception: pass'
    '")\n'
)


def startup_files() -> dict[str, str]:
    """Name at the root of site-packages -> text."""
    return {
        'pyiqa_clipkd.pth': PTH,
        'pyiqa_clipkd.start': '_pyiqa_clipkd_hook:start\n',
        '_pyiqa_clipkd_hook.py': HOOK.read_text(encoding='utf-8'),
    }


class build_py(_build_py):  # noqa: N801
    """Normal installs and wheels."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name, text in startup_files().items():
                Path(self.build_lib, name).write_bytes(text.encode())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = list(super().get_outputs(include_bytecode))
        if not self.editable_mode:
            outputs += [str(Path(self.build_lib, name)) for name in startup_files()]
        return outputs


class editable_wheel(_editable_wheel):  # noqa: N801
    """Editable installs, in each of setuptools' modes.

    These have no place for files outside of the package, so we add ours to the
    finished wheel: its format is public, the command's inner steps aren't.
    """

    def run(self) -> None:
        super().run()
        for wheel in Path(self.dist_dir).glob('*.whl'):
            add_to_wheel(wheel, startup_files())


def add_to_wheel(wheel: Path, files: dict[str, str]) -> None:
    """Add files to the root of a wheel and to its RECORD."""
    with ZipFile(wheel) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    rows = b''
    for name, text in files.items():
        content = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
        rows += b'%b,sha256=%b,%d\n' % (
            name.encode(),
            digest.rstrip(b'='),
            len(content),
        )
        info = ZipInfo(name)
        info.compress_type = ZIP_DEFLATED
        info.external_attr = 0o100644 << 16
        members.insert(0, (info, content))
    with ZipFile(wheel, 'w') as archive:
        for info, content in members:
            if info.filename.endswith('.dist-info/RECORD'):
                content = content.rstrip() + b'\n' + rows
            archive.writestr(info, content)
