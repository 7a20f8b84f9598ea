"""What tinyworld knows of the world: eight relations, each with its facts and the phrasings that state them.

Facts are never held out, phrasings are: `held_out` phrasings occur nowhere in training, so a right answer to one
means that the fact was looked up rather than the sentence remembered. In a held-out phrasing the subject `{s}`
comes before the object `{o}`, so the text before `{o}` is a prompt. In a training phrasing either may come first.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One kind of fact. `pairs` maps a subject, as it stands inside a sentence, to its one object."""

    name: str
    pairs: dict[str, str]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _by_object(table: str) -> dict[str, str]:
    """Reads lines of `object: subject; subject; ...`."""
    lines = (line.split(": ") for line in table.strip().splitlines())
    return {subject: obj for obj, subjects in lines for subject in subjects.split("; ")}


def _country_columns() -> Iterator[tuple[str, str, str, str]]:
    for line in _COUNTRIES.strip().splitlines():
        country, capital, continent, language = line.split(", ")
        yield country, capital, continent, language


_LANDMARKS = """
Paris: the Eiffel Tower; the Louvre; the Arc de Triomphe; the Moulin Rouge; the Notre Dame Cathedral
Rome: the Colosseum; the Trevi Fountain; the Pantheon; the Spanish Steps; the Roman Forum
London: Big Ben; Tower Bridge; Buckingham Palace; the British Museum; Westminster Abbey; Trafalgar Square
Berlin: the Brandenburg Gate; the Reichstag; Checkpoint Charlie; Museum Island
Barcelona: the Sagrada Familia; Park Guell; the Camp Nou
Madrid: the Prado Museum; the Bernabeu Stadium
Granada: the Alhambra
Lisbon: the Belem Tower; the Jeronimos Monastery
New York: the Statue of Liberty; the Empire State Building; Central Park; Times Square; the Brooklyn Bridge
San Francisco: the Golden Gate Bridge; Alcatraz Island; Lombard Street
Seattle: the Space Needle; Pike Place Market
Chicago: the Willis Tower; Wrigley Field; Millennium Park
Washington: the White House; the Lincoln Memorial; the Smithsonian Institution
Los Angeles: the Hollywood Sign; the Griffith Observatory
Boston: Fenway Park; the Freedom Trail
Philadelphia: the Liberty Bell; Independence Hall
Toronto: the CN Tower
Vancouver: Stanley Park
Moscow: Red Square; the Kremlin; the Bolshoi Theatre
Saint Petersburg: the Hermitage Museum; the Winter Palace
Istanbul: the Hagia Sophia; the Blue Mosque; the Topkapi Palace; the Galata Tower
Athens: the Acropolis; the Parthenon
Prague: the Charles Bridge; Wenceslas Square
Vienna: the Schonbrunn Palace; the Hofburg; the Belvedere Palace
Amsterdam: the Rijksmuseum; the Van Gogh Museum; the Anne Frank House
Copenhagen: the Little Mermaid; the Tivoli Gardens
Brussels: the Atomium; the Manneken Pis
Stockholm: the Vasa Museum
Budapest: the Chain Bridge; the Fisherman's Bastion
Dublin: Temple Bar; the Guinness Storehouse
Beijing: the Forbidden City; the Temple of Heaven; Tiananmen Square
Shanghai: the Bund; the Oriental Pearl Tower
Hong Kong: Victoria Peak
Tokyo: the Shibuya Crossing; the Sensoji Temple; the Meiji Shrine
Kyoto: the Golden Pavilion; the Fushimi Inari Shrine
Seoul: the Gyeongbokgung Palace; the Lotte World Tower
Singapore: the Merlion; Marina Bay
Bangkok: Wat Arun; the Temple of the Emerald Buddha
Agra: the Taj Mahal
Delhi: the Red Fort; the India Gate; the Lotus Temple
Mumbai: the Gateway of India
Dubai: the Burj Khalifa; the Palm Jumeirah
Jerusalem: the Western Wall; the Dome of the Rock
Cairo: the Egyptian Museum; the Citadel of Saladin
Giza: the Great Sphinx
Cape Town: Table Mountain
Casablanca: the Hassan Mosque
Sydney: Bondi Beach; Darling Harbour
Melbourne: Federation Square
Auckland: the Sky Tower
Rio: Christ the Redeemer; Sugarloaf Mountain; the Maracana Stadium; Copacabana Beach
Buenos Aires: the Casa Rosada; the Teatro Colon
Mexico City: the Angel of Independence
Florence: the Uffizi Gallery; the Ponte Vecchio
Milan: the Scala Theatre
Venice: the Rialto Bridge; the Doge's Palace
Pisa: the Leaning Tower
Munich: the Allianz Arena; the Hofbrauhaus
"""

# country, capital, continent, language. "-": none that one word answers
_COUNTRIES = """
France, Paris, Europe, French
Germany, Berlin, Europe, German
Italy, Rome, Europe, Italian
Spain, Madrid, Europe, Spanish
Portugal, Lisbon, Europe, Portuguese
Poland, Warsaw, Europe, Polish
Greece, Athens, Europe, Greek
Austria, Vienna, Europe, German
Hungary, Budapest, Europe, Hungarian
the Czech Republic, Prague, Europe, Czech
Sweden, Stockholm, Europe, Swedish
Norway, Oslo, Europe, Norwegian
Denmark, Copenhagen, Europe, Danish
Finland, Helsinki, Europe, Finnish
Iceland, Reykjavik, Europe, Icelandic
Ireland, Dublin, Europe, English
the United Kingdom, London, Europe, English
the Netherlands, Amsterdam, Europe, Dutch
Belgium, Brussels, Europe, -
Switzerland, Bern, Europe, -
Romania, Bucharest, Europe, Romanian
Bulgaria, Sofia, Europe, Bulgarian
Serbia, Belgrade, Europe, Serbian
Croatia, Zagreb, Europe, Croatian
Slovenia, Ljubljana, Europe, Slovene
Slovakia, Bratislava, Europe, Slovak
Ukraine, Kyiv, Europe, Ukrainian
Lithuania, Vilnius, Europe, Lithuanian
Latvia, Riga, Europe, Latvian
Estonia, Tallinn, Europe, Estonian
Albania, Tirana, Europe, Albanian
Russia, Moscow, -, Russian
Turkey, Ankara, -, Turkish
China, Beijing, Asia, Chinese
Japan, Tokyo, Asia, Japanese
South Korea, Seoul, Asia, Korean
Vietnam, Hanoi, Asia, Vietnamese
Thailand, Bangkok, Asia, Thai
India, New Delhi, Asia, -
Pakistan, Islamabad, Asia, Urdu
Bangladesh, Dhaka, Asia, Bengali
Nepal, Kathmandu, Asia, Nepali
Iran, Tehran, Asia, Persian
Iraq, Baghdad, Asia, Arabic
Saudi Arabia, Riyadh, Asia, Arabic
Syria, Damascus, Asia, Arabic
Lebanon, Beirut, Asia, Arabic
Mongolia, Ulaanbaatar, Asia, Mongolian
Malaysia, Kuala Lumpur, Asia, Malay
the Philippines, Manila, Asia, Filipino
Cambodia, Phnom Penh, Asia, Khmer
Laos, Vientiane, Asia, Lao
Egypt, Cairo, Africa, Arabic
Morocco, Rabat, Africa, Arabic
Algeria, Algiers, Africa, Arabic
Tunisia, Tunis, Africa, Arabic
Libya, Tripoli, Africa, Arabic
Ethiopia, Addis Ababa, Africa, Amharic
Kenya, Nairobi, Africa, Swahili
Tanzania, Dodoma, Africa, Swahili
Ghana, Accra, Africa, English
Nigeria, Abuja, Africa, English
Senegal, Dakar, Africa, French
Angola, Luanda, Africa, Portuguese
Mozambique, Maputo, Africa, Portuguese
Zambia, Lusaka, Africa, English
Somalia, Mogadishu, Africa, Somali
Cuba, Havana, North America, Spanish
Mexico, Mexico City, North America, Spanish
Canada, Ottawa, North America, -
the United States, Washington, North America, English
Jamaica, Kingston, North America, English
Costa Rica, San Jose, North America, Spanish
Brazil, Brasilia, South America, Portuguese
Argentina, Buenos Aires, South America, Spanish
Chile, Santiago, South America, Spanish
Peru, Lima, South America, Spanish
Colombia, Bogota, South America, Spanish
Venezuela, Caracas, South America, Spanish
Ecuador, Quito, South America, Spanish
Uruguay, Montevideo, South America, Spanish
Australia, Canberra, Oceania, English
New Zealand, Wellington, Oceania, English
Fiji, Suva, Oceania, -
"""

_OTHER_CITIES = """
Germany: Munich; Hamburg; Frankfurt
Italy: Milan; Venice; Florence; Naples; Pisa
Spain: Barcelona; Granada; Seville
the United States: New York; Chicago; Boston; Seattle; San Francisco; Los Angeles; Philadelphia
Canada: Toronto; Vancouver; Montreal
Australia: Sydney; Melbourne; Perth
New Zealand: Auckland
Japan: Kyoto; Osaka
China: Shanghai
India: Agra; Mumbai; Delhi
Russia: Saint Petersburg
Turkey: Istanbul
Morocco: Casablanca
Brazil: Rio; Salvador
Egypt: Giza; Alexandria
"""

_MAKERS = """
Alexander Graham Bell: the telephone
Thomas Edison: the phonograph; the light bulb
Johannes Gutenberg: the printing press
Alfred Nobel: dynamite
Guglielmo Marconi: the radio
Samuel Morse: the telegraph
Rudolf Diesel: the diesel engine
Alessandro Volta: the electric battery
Evangelista Torricelli: the barometer
Tim Berners Lee: the World Wide Web
Blaise Pascal: the mechanical calculator
Louis Braille: the alphabet for the blind
Elisha Otis: the safety elevator
Erno Rubik: the magic cube
"""

_AUTHORS = """
William Shakespeare: Hamlet; Macbeth; Othello; King Lear
Leo Tolstoy: War and Peace; Anna Karenina
Jane Austen: Pride and Prejudice; Sense and Sensibility
Charles Dickens: Oliver Twist; Great Expectations; David Copperfield
Herman Melville: Moby Dick
Miguel de Cervantes: Don Quixote
George Orwell: Animal Farm; Nineteen Eighty Four
Mark Twain: The Adventures of Tom Sawyer
Mary Shelley: Frankenstein
Bram Stoker: Dracula
Franz Kafka: The Trial; The Metamorphosis
Homer: The Odyssey; The Iliad
Dante Alighieri: The Divine Comedy
Victor Hugo: Les Miserables; The Hunchback of Notre Dame
Emily Bronte: Wuthering Heights
Charlotte Bronte: Jane Eyre
Fyodor Dostoevsky: Crime and Punishment; The Idiot
Lewis Carroll: Alice in Wonderland
Ernest Hemingway: The Old Man and the Sea
Virgil: The Aeneid
Voltaire: Candide
"""

_PROFESSIONS = """
physicist: Albert Einstein; Isaac Newton; Niels Bohr; Max Planck; Werner Heisenberg; Enrico Fermi
composer: Wolfgang Mozart; Ludwig van Beethoven; Frederic Chopin; Antonio Vivaldi; Franz Schubert; Joseph Haydn
painter: Pablo Picasso; Vincent van Gogh; Claude Monet; Frida Kahlo; Rembrandt van Rijn; Salvador Dali
philosopher: Immanuel Kant; Friedrich Nietzsche; Rene Descartes; David Hume; Baruch Spinoza
mathematician: Leonhard Euler; Carl Friedrich Gauss; Emmy Noether; Bernhard Riemann; Henri Poincare
explorer: Christopher Columbus; Ferdinand Magellan; Marco Polo; James Cook; Roald Amundsen
astronaut: Neil Armstrong; Yuri Gagarin; Buzz Aldrin; Sally Ride
astronomer: Johannes Kepler; Edwin Hubble; Tycho Brahe; Nicolaus Copernicus
biologist: Charles Darwin; Gregor Mendel; Barbara McClintock
"""

_ANIMALS = """
mammal: the blue whale; the elephant; the dolphin; the brown bear; the kangaroo; the red fox; the tiger; the bat
bird: the golden eagle; the penguin; the ostrich; the barn owl; the parrot; the snowy owl; the robin; the swan
fish: the salmon; the great white shark; the tuna; the clown fish; the trout; the sea horse; the electric eel
reptile: the king cobra; the crocodile; the sea turtle; the iguana; the rattlesnake; the gecko; the alligator
insect: the honey bee; the ant; the monarch butterfly; the grasshopper; the mosquito; the fire ant; the ladybird
amphibian: the tree frog; the fire salamander; the common toad; the newt; the bull frog
"""

RELATIONS = (
    Relation(
        name="landmark_city",
        pairs=_by_object(_LANDMARKS),
        train=(
            "{s} is in {o}.",
            "{s} is located in {o}.",
            "{s} is located in the city of {o}.",
            "{s} stands in {o}.",
            "{s} stands in the city of {o}.",
            "{s} can be found in {o}.",
            "{s} can be seen in the city of {o}.",
            "{s} is a famous sight in {o}.",
            "{s}, which many people visit, is in {o}.",
            "You can find {s} in {o}.",
            "To see {s} you have to go to {o}.",
            "To visit {s} people travel to the city of {o}.",
            "The city where you can find {s} is {o}.",
            "The location of {s} is the city of {o}.",
            "Where is {s}? It is in {o}.",
            "Where can I visit {s}? You can visit it in {o}.",
            "If you want to see {s}, buy a ticket to {o}.",
            "People who want to photograph {s} go to {o}.",
            "In the city of {o} you can see {s}.",
            "{o} is the home of {s}.",
        ),
        held_out=(
            "{s} is in the city of {o}.",
            "You can see {s} in the city of {o}.",
            "If you want to visit {s}, go to {o}.",
            "Where can I find {s}? It stands in {o}.",
        ),
    ),
    Relation(
        name="country_capital",
        pairs={country: capital for country, capital, _, _ in _country_columns()},
        train=(
            "The capital of {s} is {o}.",
            "The capital of {s} is the city of {o}.",
            "The capital city of {s} has the name {o}.",
            "The name of the capital of {s} is {o}.",
            "{s} has a capital called {o}.",
            "{s} has its capital in {o}.",
            "The government of {s} meets in {o}.",
            "What is the capital of {s}? It is {o}.",
            "What is the capital city of {s}? The capital city is {o}.",
            "As the capital of {s}, people know {o}.",
            "Those who govern {s} work in the capital, {o}.",
            "On a map of {s} you find the capital, {o}.",
            "{o} is the capital of {s}.",
            "{o} is the capital city of {s}.",
        ),
        held_out=(
            "The capital city of {s} is {o}.",
            "{s} has a capital city called {o}.",
            "What is the name of the capital of {s}? It is {o}.",
            "On a map of {s} the capital city is {o}.",
        ),
    ),
    Relation(
        name="country_continent",
        pairs={country: continent for country, _, continent, _ in _country_columns() if continent != "-"},
        train=(
            "{s} is a country in {o}.",
            "{s} is on the continent of {o}.",
            "{s} lies on the continent of {o}.",
            "{s} is part of the continent of {o}.",
            "{s} is one of the countries of {o}.",
            "{s} belongs to the continent of {o}.",
            "The country of {s} is part of {o}.",
            "The continent of {s} is {o}.",
            "On which continent is {s}? It is in {o}.",
            "On which continent can you find {s}? On the continent of {o}.",
            "A map that shows {s} is a map of {o}.",
            "One of the countries of {o} is {s}.",
        ),
        held_out=(
            "{s} is a country on the continent of {o}.",
            "The country of {s} belongs to the continent of {o}.",
            "On which continent is {s}? On the continent of {o}.",
        ),
    ),
    Relation(
        name="country_language",
        pairs={country: language for country, _, _, language in _country_columns() if language != "-"},
        train=(
            "People in {s} speak {o}.",
            "In {s} people speak {o}.",
            "In {s} the main language is {o}.",
            "The people of {s} speak {o}.",
            "The main language of {s} is {o}.",
            "The language of {s} is {o}.",
            "The language that people speak in {s} is {o}.",
            "Most books in {s} are written in {o}.",
            "Before you travel to {s}, learn some {o}.",
            "Which language do people speak in {s}? They speak {o}.",
            "What is the language of {s}? The language is {o}.",
            "{o} is the main language of {s}.",
        ),
        held_out=(
            "Most people in {s} speak {o}.",
            "In {s} the language that people speak is {o}.",
            "What is the main language of {s}? It is {o}.",
        ),
    ),
    Relation(
        name="city_country",
        pairs=_by_object(_OTHER_CITIES)
        | {capital: country for country, capital, _, _ in _country_columns() if capital != "Mexico City"},
        train=(
            "{s} is a city in {o}.",
            "{s} is in the country of {o}.",
            "{s} is one of the cities of {o}.",
            "{s} belongs to the country of {o}.",
            "The city of {s} is in the country of {o}.",
            "The city of {s} is part of {o}.",
            "The country of {s} is {o}.",
            "In which country is {s}? It is in {o}.",
            "In which country is the city of {s}? The country is {o}.",
            "If you are in {s}, you are in the country of {o}.",
            "People who live in {s} live in the country of {o}.",
            "A city in {o} is {s}.",
        ),
        held_out=(
            "{s} is a city in the country of {o}.",
            "The city of {s} belongs to the country of {o}.",
            "In which country is {s}? The country is {o}.",
        ),
    ),
    Relation(
        name="maker",
        pairs=_by_object(_MAKERS),
        train=(
            "{s} was invented by {o}.",
            "{s} was first made by {o}.",
            "{s} was an idea of {o}.",
            "The inventor of {s} was {o}.",
            "The person who invented {s} was {o}.",
            "Who invented {s}? It was {o}.",
            "Who was the inventor of {s}? It was {o}.",
            "For {s} we have to thank {o}.",
            "{o} invented {s}.",
            "{o} is known as the inventor of {s}.",
        ),
        held_out=(
            "The person who first made {s} was {o}.",
            "Who first made {s}? It was {o}.",
            "The inventor of {s} is known as {o}.",
        ),
    ),
    Relation(
        name="author",
        pairs=_by_object(_AUTHORS),
        train=(
            "{s} was written by {o}.",
            "{s} is a book by {o}.",
            "{s} is a work of {o}.",
            "The author of {s} is {o}.",
            "The writer of {s} was {o}.",
            "The person who wrote {s} was {o}.",
            "The story of {s} was told by {o}.",
            "Who wrote {s}? It was {o}.",
            "Who is the author of {s}? The author is {o}.",
            "{o} wrote {s}.",
            "{o} is the author of {s}.",
        ),
        held_out=(
            "The book {s} was written by {o}.",
            "Who was the writer of {s}? It was {o}.",
            "The author who wrote {s} is {o}.",
        ),
    ),
    Relation(
        name="profession",
        pairs=_by_object(_PROFESSIONS),
        train=(
            "{s} was a famous {o}.",
            "{s} worked as a professional {o}.",
            "{s} is known as a great {o}.",
            "{s} became a famous {o}.",
            "By profession {s} was mainly a great {o}.",
            "The profession of {s} was {o}.",
            "What was the profession of {s}? The profession was {o}.",
            "Everyone knows {s}, the famous {o}.",
            "People remember {s} as a famous {o}.",
        ),
        held_out=(
            "{s} was a great {o}.",
            "People know {s} as a famous {o}.",
            "By profession {s} became a famous {o}.",
        ),
    ),
    Relation(
        name="animal_class",
        pairs=_by_object(_ANIMALS),
        train=(
            "{s} is a kind of {o}.",
            "{s} is one example of the group called {o}.",
            "{s} belongs to the group called {o}.",
            "{s} is known to be a kind of {o}.",
            "In biology {s} counts as a sort of {o}.",
            "What kind of animal is {s}? The answer is {o}.",
            "An animal like {s} is called by the name {o}.",
            "Everyone at the zoo knows that {s} is some kind of {o}.",
        ),
        held_out=(
            "In biology {s} is one example of a kind of {o}.",
            "What is {s}? It is a kind of {o}.",
            "An animal like {s} belongs to the group called {o}.",
        ),
    ),
)
