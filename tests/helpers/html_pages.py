"""Pages in HTML, taken apart: whether tags match, and what a page names, links and loads."""

import html.parser

# Elements without an end.
VOID = {"meta", "br", "img", "link", "input", "hr"}
# Attributes with which a page makes a browser load something.
LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href"}


class Page(html.parser.HTMLParser):
    """A page's ids, links, texts, and all that it would load or run."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []  # what a browser fetches or runs
        self.elements: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name == "href" or name in LOADING or name.startswith("on"):
                self.loaded.append(f"{tag} {name}={value}")
            if name == "style" or name == "http-equiv" and value.lower() == "refresh":
                self.loaded.append(f"{tag} {name}={value}")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> within {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data):
        # What a style sheet says is no text, and may load too.
        if self._open and self._open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.texts.append(data)
