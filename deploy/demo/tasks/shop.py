"""The made-up shop that the demo is about: its customers, cities and goods, as slot values."""

from random import Random

from deploy.demo.tasks.example import Pool, Split, words

FIRST_NAMES = Pool(
    train=words(
        "Ada Amir Anna Bela Boris Carla Chen Clara David Diego Elena Emil Fatima Felix Frida Georg Gita "
        "Hanna Hugo Ines Ivan Jakob Jana Juan Karim Karin Leo Lina Lucas Maja Marco Maria Mei Milo Nadia "
        "Nils Nora Omar Paula Pedro Petra Rahul Rosa Samir Sara Simon Sofia Tariq Tessa Tom Uma Vera Viktor "
        "Wanda Yara Yusuf Zoe Olivia James Emma Noah Grace "
        "Abdul Agnes Aisha Alba Arthur Beatriz Bruno Camille Cedric Dalia Edith Esra Farid Gustav Hiroshi Ida "
        "Jasmin Kenji Lars Magnus Mina Nikolai Otto Quentin Rania Ruben Selma Stefan Thea Umberto Xavier Zainab"
    ),
    heldout=words("Priya Mateo Ingrid Kofi Astrid Luca Amara Dmitri Sakura Owen Leila Henrik Bianca Theo"),
)
LAST_NAMES = Pool(
    train=words(
        "Adler Ahmed Almeida Bauer Becker Brown Castro Cohen Costa Diaz Dubois Evans Fischer Garcia Haddad "
        "Hansen Ito Jensen Jones Kaya Keller Khan Kim Kowalski Larsen Lee Lopez Martin Meyer Miller Moreau "
        "Nguyen Novak Okafor Patel Perez Petrov Rossi Sato Schmidt Silva Singh Smith Torres Weber Wilson "
        "Abbott Andersson Bianchi Blake Chavez Dvorak Eriksen Fontaine Gupta Horvath Ivanova Jovanovic Kuznetsov "
        "Laurent Mbeki Nakamura Nowak Pereira Quinn Ramirez Sorensen Takahashi Usman Vasquez Wong Yilmaz Zhang"
    ),
    heldout=words("Nair Lindqvist Mensah Romano Ferreira Volkov Tanaka Whitfield Farahani Dahl Conti Rojas"),
)
CITIES = Pool(
    # Many, so that a city is copied from the message and not chosen from a list learnt by heart.
    train=words(
        "Accra, Adelaide, Aleppo, Amsterdam, Ankara, Antwerp, Athens, Atlanta, Auckland, Austin, Baghdad, "
        "Baku, Baltimore, Bangkok, Barcelona, Basel, Beirut, Belfast, Belgrade, Berlin, Birmingham, Bogota, "
        "Bologna, Bordeaux, Boston, Bratislava, Bremen, Brighton, Brisbane, Bristol, Brussels, Bucharest, "
        "Budapest, Cairo, Calgary, Cape Town, Cardiff, Casablanca, Chennai, Chicago, Cologne, Copenhagen, "
        "Cordoba, Dakar, Dallas, Damascus, Delhi, Denver, Detroit, Doha, Dresden, Dubai, Durban, Edinburgh, "
        "Florence, Frankfurt, Galway, Gdansk, Geneva, Genoa, Ghent, Glasgow, Gothenburg, Granada, Graz, "
        "Hamburg, Hanoi, Havana, Helsinki, Houston, Innsbruck, Istanbul, Izmir, Jakarta, Kampala, Karachi, "
        "Kiel, Kobe, Krakow, Kyiv, Lagos, Lahore, Leeds, Leipzig, Lille, Lima, Linz, Ljubljana, London, "
        "Luxembourg, Lyon, Madrid, Malaga, Manchester, Manila, Melbourne, Memphis, Miami, Milan, Montreal, "
        "Munich, Nagoya, Nairobi, Naples, New York, Nice, Odessa, Osaka, Ottawa, Padua, Palermo, Paris, "
        "Perth, Phoenix, Pisa, Porto, Prague, Quebec, Quito, Reykjavik, Riga, Rome, Rotterdam, Salzburg, San "
        "Diego, Santiago, Sapporo, Seattle, Seoul, Seville, Shanghai, Sofia, Split, Stockholm, Stuttgart, "
        "Sydney, Tallinn, Tampa, Tirana, Tokyo, Trieste, Tunis, Turin, Utrecht, Valletta, Vancouver, Venice, "
        "Verona, Vienna, Vilnius, Warsaw, Wellington, Winnipeg, York, Yokohama, Zagreb, Zanzibar, Zaragoza",
        ", ",
    ),
    heldout=("Lisbon", "Oslo", "Dublin", "Zurich", "Toronto", "Bergen", "Marseille", "Kyoto", "Valencia"),
)
# Singular in the database, plural (+s) in a customer's message.
ITEMS = Pool(
    train=words(
        "anchor, bell, blue mug, brass lamp, canvas bag, sextant, cork mat, deck chair, desk lamp, fishing "
        "rod, garden hose, glass bottle, hammock, ink pen, iron hook, kettle, leather belt, life jacket, "
        "linen shirt, logbook, oak table, oil lantern, paddle, paint roller, pillow, pine shelf, rain jacket, "
        "red scarf, rope ladder, rubber boot, sail, sea chart, signal flag, silver spoon, steel bolt, straw "
        "hat, tea pot, tent, toolbox, wine jug, wooden crate",
        ", ",
    ),
    heldout=words(
        "wool blanket, copper pan, storm lantern, folding chair, clay bowl, winter coat, paper map, brass "
        "sextant, canvas tent, bicycle pump, cotton towel",
        ", ",
    ),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def draw_name(rng: Random, split: Split) -> str:
    """A full name; held-out names share neither the first nor the last name with training."""
    return f"{FIRST_NAMES.draw(rng, split)} {LAST_NAMES.draw(rng, split)}"
