"""The chat page: a scenario in, thought and advisory out as they are written; in Hindi, and for this machine only.

Nothing a model or a visitor writes is read as HTML or Markdown: it stands in text boxes. Nothing is fetched from
another machine, and nothing told to one.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Event
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.data.synthetic import (
    CROP,
    CROPS,
    FIELDS,
    SYMPTOM,
    make_rows,
)
from agri_moe.generation import Decoding, Generated, stream

HOST = "127.0.0.1"
MAX_CHARACTERS = 2000
"""Of a scenario: a page of text."""
MAX_BODY = 4 << 20
"""Bytes of a request. Well above the longest scenario, so that one that is too long is told so in the page."""
MAX_WAITING = 64
"""Requests in the queue; whoever comes later is asked to come again."""
SECONDS_BETWEEN = 0.1
"""A browser that is told every token of a fast model does nothing but draw."""

TITLE = "कृषि सलाहकार"
NOTICE = (
    "**ध्यान दें:** यह सलाह एक कंप्यूटर मॉडल लिखता है और वह गलत हो सकती है; यह कृषि विशेषज्ञ का विकल्प नहीं है। "
    "कोई भी उपाय करने से पहले अपने कृषि विज्ञान केंद्र से पूछें।\n\n"
    "*This advice is written by a computer model and may be wrong; it is no substitute for an agronomist. "
    "Ask your Krishi Vigyan Kendra before acting on it.*"
)
WAITING = "प्रतीक्षा करें…"
THINKING = "सोच रहे हैं…"
WRITING = "सलाह लिख रहे हैं…"
STOPPED = "रोक दिया गया।"
EMPTY = "कृपया पहले अपनी फसल की स्थिति लिखें।"
NOT_TEXT = "कृपया स्थिति को सादे पाठ में लिखें।"
TOO_LONG = "स्थिति बहुत लंबी है: कृपया {most} अक्षरों तक में लिखें, आपने {given} लिखे हैं।"
TOO_MANY_TOKENS = "स्थिति इस मॉडल के लिए बहुत लंबी है: कृपया उसे छोटा करें।"
TOO_LARGE = "अनुरोध बहुत बड़ा है: कृपया स्थिति छोटी करके फिर भेजें।"
NO_SUCH_DOOR = "यह पता यहाँ नहीं है।"
ENDS = {
    "end": "पूरा हुआ",
    "thought_budget": "पूरा हुआ (विचार छोटा किया गया)",
    "length": "लंबाई की सीमा पर रुका",
    "stopped": "रोक दिया गया",
}
ENGLISH = dict(
    zip((CROP, *FIELDS, SYMPTOM), ("crop", "stage", "soil", "weather", "irrigation", "symptoms"), strict=True)
)
FORM = tuple(ENGLISH)

# Devanagari of the reader's own system: gradio's themes would fetch theirs.
FONTS = ["Noto Sans Devanagari", "Nirmala UI", "Kohinoor Devanagari", "Mangal", "system-ui", "sans-serif"]
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1080px !important; margin: auto}
#notice {background: #fff7e0; border-left: 4px solid #d97706; padding: 8px 14px; border-radius: 6px}
#notice * {color: #553300}
@media (max-width: 700px) {
  #sides {flex-direction: column}
  #sides > .column {min-width: 0 !important; width: 100%}
}
#advisory textarea, #thought textarea {font-size: 1.05rem; line-height: 1.75; opacity: 1}
"""
# On a phone the answer stands below the form.
TO_ANSWER = "() => {if (innerWidth <= 700) document.getElementById('state').scrollIntoView({behavior: 'smooth'})}"
# What the page itself needs; the same rule keeps a browser from asking any other machine for anything.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; frame-ancestors 'none'"


class RefusalError(ValueError):
    """Says in one Hindi sentence what a visitor should change."""


# ---------------------------------------------------------------------- answers


class Advisor:
    """A model that answers visitors one after the other, in the order in which they came.

    Args:
        model: On its device, in eval mode.
        chat: Its chat format.
        decoding: How it answers.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, decoding: Decoding) -> None:
        self.model, self.chat, self.decoding = model, chat, decoding
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="advisor")
        self.stops: dict[str | None, Event] = {}

    def prompt(self, scenario: object) -> list[int]:
        """The ids to answer; RefusalError if there is nothing to answer, or too much."""
        text = scenario_text(scenario)
        ids = self.chat.encode_prompt(text)
        room: int | None = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and len(ids) + self.decoding.max_new_tokens > room:
            raise RefusalError(TOO_MANY_TOKENS)
        return ids

    def answer(self, scenario: object, visitor: str | None) -> Iterator[tuple[str, str, str]]:
        """Thought, advisory and how it stands, as often as there is more; a refusal is a state too.

        Args:
            scenario: Text, or a form's fields by their names.
            visitor: Who may stop it.
        """
        try:
            ids = self.prompt(scenario)
        except RefusalError as refusal:
            yield "", "", str(refusal)
            return
        stop = self.stops.setdefault(visitor, Event())
        yield "", "", STOPPED if stop.is_set() else WAITING
        try:
            if stop.is_set():  # while it waited for its turn
                return
            shown = 0.0
            for answer in stream(self.model, self.chat, ids, worker=self.worker, stop=stop, **asdict(self.decoding)):
                if answer.stop_reason or time.monotonic() - shown >= SECONDS_BETWEEN:
                    yield answer.thought or "", answer.advisory, standing(answer)
                    shown = time.monotonic()
        finally:
            if self.stops.get(visitor) is stop:
                del self.stops[visitor]

    def expect(self, visitor: str | None) -> None:
        """A visitor's question is on its way, and can be stopped from now on."""
        self.stops[visitor] = Event()

    def stop(self, visitor: str | None) -> None:
        """Stop what is being written for a visitor at its next token, or before it begins."""
        if (stop := self.stops.get(visitor)) is not None:
            stop.set()

    def leave(self, visitor: str | None) -> None:
        """Stop it, and keep nothing of the visitor."""
        self.stop(visitor)
        self.stops.pop(visitor, None)


def scenario_text(scenario: object) -> str:
    """What a visitor has sent, as `render_scenario` writes a struct: a line for each field that is not empty.

    Raises:
        RefusalError: If that is no text, empty, or too long.
    """
    fields: list[tuple[str, Any]] = list(scenario.items()) if isinstance(scenario, dict) else [("", scenario)]
    if not all(value is None or isinstance(value, str) for _, value in fields):
        raise RefusalError(NOT_TEXT)
    lines = [(name, value.strip()) for name, value in fields if value and value.strip()]
    if not lines:
        raise RefusalError(EMPTY)
    text = "\n".join(f"{name}: {value}" if name else value for name, value in lines)
    if len(text) > MAX_CHARACTERS:
        raise RefusalError(TOO_LONG.format(most=f"{MAX_CHARACTERS:,}", given=f"{len(text):,}"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RefusalError(NOT_TEXT) from None
    return text


def standing(answer: Generated) -> str:
    """How far an answer is."""
    if answer.stop_reason:
        return f"{ENDS[answer.stop_reason]}: {answer.tokens} टोकन, {answer.seconds:.1f} सेकंड।"
    return WRITING if answer.advisory else THINKING


# ---------------------------------------------------------------------- the page


def build_page(advisor: Advisor) -> gr.Blocks:
    """The page, wired to a model."""

    def from_form(
        crop: Any, stage: Any, soil: Any, weather: Any, irrigation: Any, symptoms: Any, request: gr.Request
    ) -> Iterator[tuple[str, str, str]]:
        fields = (crop, stage, soil, weather, irrigation, symptoms)
        yield from advisor.answer(dict(zip(FORM, fields, strict=True)), request.session_hash)

    def from_text(text: Any, request: gr.Request) -> Iterator[tuple[str, str, str]]:
        yield from advisor.answer(text, request.session_hash)

    def begun(request: gr.Request) -> tuple[Any, ...]:
        advisor.expect(request.session_hash)
        return "", "", WAITING, *_buttons(running=True)

    def stopped(request: gr.Request) -> tuple[Any, ...]:
        advisor.stop(request.session_hash)
        return STOPPED, *_buttons(running=False)

    def left(request: gr.Request) -> None:
        advisor.leave(request.session_hash)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nअपनी फसल की स्थिति बताइए; मॉडल पहले विचार करेगा, फिर सलाह देगा।")
        gr.Markdown(NOTICE, elem_id="notice")
        with gr.Row(elem_id="sides"):
            with gr.Column():
                with gr.Tab("फ़ॉर्म"):
                    form = _form()
                    ask_form = gr.Button("सलाह लें", variant="primary", elem_id="ask-form")
                    _gallery(_examples(), form)
                with gr.Tab("अपने शब्दों में"):
                    words = gr.Textbox(label="स्थिति", lines=7, placeholder=_WORDS[0], elem_id="words")
                    ask_text = gr.Button("सलाह लें", variant="primary", elem_id="ask-text")
                    _gallery([[text] for text in _WORDS], [words])
            with gr.Column():
                state = gr.Markdown("", elem_id="state")
                with gr.Accordion("विचार (मॉडल का तर्क)", open=True, elem_id="thought-block"):
                    thought = _output("thought", "विचार", lines=2, show_label=False)
                advisory = _output("advisory", "सलाह", lines=4)
                stop = gr.Button("रोकें", variant="stop", interactive=False, elem_id="stop")
        buttons, outputs = [ask_form, ask_text, stop], [thought, advisory, state]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}
        running = []
        for ask, answer, inputs, name in ((ask_form, from_form, form, "form"), (ask_text, from_text, [words], "text")):
            # The buttons change at once, the answer waits for its turn, the buttons change back.
            asked = ask.click(begun, None, [*outputs, *buttons], **quiet)
            ask.click(None, js=TO_ANSWER)
            running.append(asked.then(answer, inputs, outputs, api_name=name, **turn))
            running[-1].then(lambda: _buttons(running=False), None, buttons, **quiet)
        stop.click(stopped, None, [state, *buttons], cancels=running, **quiet)
    page.unload(left)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def _buttons(running: bool) -> tuple[Any, ...]:
    return *(gr.Button(interactive=not running) for _ in range(2)), gr.Button(interactive=running)


def _form() -> list[Any]:
    crop = gr.Dropdown(list(CROPS), value=None, label=_label(CROP), allow_custom_value=True)
    fields = [crop]
    for names in (list(FIELDS)[:2], list(FIELDS)[2:]):
        with gr.Row():
            for name in names:
                words = [wording for wordings in FIELDS[name].values() for wording in wordings]
                fields.append(
                    gr.Dropdown(words, value=None, label=_label(name), allow_custom_value=True, min_width=140)
                )
    symptoms = gr.Textbox(label=_label(SYMPTOM), lines=2, placeholder="पत्तियों पर भूरे धब्बे हैं, पत्तों की नोक सूख रही है")
    return [*fields, symptoms]


def _label(name: str) -> str:
    return f"{name} ({ENGLISH[name]})"


def _output(name: str, label: str, **options: Any) -> gr.Textbox:
    return gr.Textbox(label=label, elem_id=name, interactive=False, max_lines=24, autoscroll=False, **options)


def _gallery(examples: list[list[str]], inputs: list[Any]) -> None:
    """Examples to choose from, by how each begins and ends."""
    names = [example[0] if len(example) == 1 else f"{example[0]}: {example[-1]}" for example in examples]
    names = [name if len(name) <= 60 else f"{name[:59].rstrip()}…" for name in names]
    gr.Examples(examples, inputs=inputs, label="उदाहरण", example_labels=names, api_visibility="private")


def _examples() -> list[list[str]]:
    rows = make_rows(4, seed=11, split="validation")
    return [[row["scenario"][name] for name in FORM] for row in rows]


_WORDS = [
    "मेरे धान की पत्तियों पर भूरे धब्बे हैं और पत्तों की नोक सूख रही है। फूल आ रहे हैं, मिट्टी दोमट है, बादल और उमस है, पानी समय पर दिया है।",
    "सरसों में माहू जैसा कीट लगा है, पत्ते सिकुड़ गए हैं और मीठा रस टपक रहा है। फसल फूल पर है।",
]


# ---------------------------------------------------------------------- the server


def serve(page: gr.Blocks, port: int, wait: bool = True) -> str:
    """Show the page on this machine, to no one else; returns its address, after it has been closed if `wait`."""
    _, url, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=not wait,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        allowed_paths=None,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), _GATE]},
        theme=gr.themes.Soft(primary_hue="green", font=FONTS, font_mono=["monospace"]),
        css=CSS,
        head="<script>document.documentElement.lang = 'hi'</script>",
    )
    return str(url)


class Gate:
    """Lets through what the page needs: small requests, to the doors of its questions, and answers with a policy.

    Args:
        app: What is behind it.
    """

    # To ask, to stop, to leave. Gradio's others would take files, among them.
    DOORS = (
        "/gradio_api/queue/join",
        "/gradio_api/call/",
        "/gradio_api/run/",
        "/gradio_api/cancel",
        "/gradio_api/reset",
    )

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            if not scope["path"].startswith(self.DOORS):
                await _refuse(send, 404, NO_SUCH_DOOR)
                return
            body = await _body(receive)
            if body is None:
                await _refuse(send, 413, TOO_LARGE)
                return
            receive = _again(body, receive)
        await self.app(scope, receive, send_with_policy)


_GATE = Middleware(Gate)


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None if it is too large, told or not."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A receiver that gives a body that was read already, and then what comes after it."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _refuse(send: Send, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": sentence}, ensure_ascii=False).encode()})
